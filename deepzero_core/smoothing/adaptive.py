"""Certification that stops as soon as an example is settled, with the guarantee of the fixed number of samples.

An example is *settled* when for every radius r that was asked for, and for 0 (does it abstain?), it is decided whether
it is certified at r, that is whether the lower bound on p, the probability of the chosen class, reaches p_r = Φ(r/σ):

    yes   the lower end of a confidence sequence has reached p_r, at this or an earlier look; or
    no    it is futile to go on: were p as large as the upper end U of a confidence sequence at level 1 − β, the copies
          that are left of n would still bring the bound at n to p_r with probability at most β, P[Bin(n − t, U) ≥
          needed − h] ≤ β, β = 0.01. Of the examples that all n copies would certify at r it loses at most 2β in mean:
          β for U < p at any look, β for those that would have made it after all.

Then it stops; a larger radius than the largest asked one that is certified is not looked for, so that the average
certified radius is smaller than with all samples, and the certified accuracy at the asked radii is what is decided.

*Guarantee.* An answer is wrong only if its bound L exceeds p. L is the largest of
  the lower ends at the looks so far, of a confidence sequence at level 1 − α/2: with probability at least 1 − α/2 none
  of them, at whatever number of trials, exceeds p (`deepzero_core.smoothing.bounds`); and, where all n copies were
  used, the Clopper–Pearson bound at n at level 1 − α/2, which exceeds p with probability at most α/2.
Both statements are about the infinite sequence of copies and do not ask where it was left, so that by the union bound L
exceeds p with probability at most α whatever the rule that stops. (The "no" of a radius only stops: it claims nothing
and takes nothing from α.) The class is chosen from copies of its own, on which all this is conditioned.

The choice of the class stops when the class in front cannot be caught up with by what is left of the n0 copies: the
same choice.
"""

from functools import lru_cache

from scipy.special import bdtrc

from deepzero_core.smoothing.bounds import lower_bound, radius_of, sequence_lower, sequence_upper
from deepzero_core.smoothing.courses import Certificate, Course, certificate
from deepzero_core.smoothing.settings import Certification

FUTILE = 0.01
"""β."""
LOOK = 32
"""Fewest copies between two looks; later ones are an eighth of what has been seen apart."""


def adaptive(settings: Certification) -> Course[Certificate]:
    """CERTIFY that stops when it is settled."""
    counts, selected = (yield min(LOOK, settings.n0)), min(LOOK, settings.n0)
    while not _elected(counts.topk(2).values.tolist(), settings.n0 - selected):
        size = min(LOOK, settings.n0 - selected)
        counts = counts + (yield size)
        selected += size
    chosen = int(counts.argmax())
    hits = trials = 0
    lower, level = 0.0, settings.alpha / 2
    while trials < settings.n and not settled(settings, lower, hits, trials):
        size = min(max(LOOK, trials // 8), settings.n - trials)
        hits += int((yield size)[chosen])
        trials += size
        lower = max(lower, sequence_lower(hits, trials, level))
    if trials == settings.n:
        lower = max(lower, lower_bound(hits, trials, level))
    return certificate(chosen, lower, selected + trials, settings)


def settled(settings: Certification, lower: float, hits: int, trials: int) -> bool:
    """Whether every asked radius is decided by the bound so far and by `hits` in `trials`."""
    left, upper = settings.n - trials, sequence_upper(hits, trials, FUTILE)
    return all(
        (lower > 0.5 and radius_of(lower, settings.sigma) >= radius) or _chance(needed - hits, left, upper) <= FUTILE
        for radius, needed in _asked(settings)
    )


def _chance(wanted: int, trials: int, p: float) -> float:
    """P[Bin(trials, p) ≥ wanted]."""
    if wanted <= 0 or wanted > trials:
        return float(wanted <= 0)
    return float(bdtrc(wanted - 1, trials, p))


def _elected(leading: list[int], left: int) -> bool:
    first, second = leading
    return left == 0 or first - second > left


@lru_cache(maxsize=64)
def _asked(settings: Certification) -> tuple[tuple[float, int], ...]:
    """(radius, hits among n that certify it at the end; n + 1 where none do)."""
    return tuple((radius, _needed(settings, radius)) for radius in sorted({0.0, *settings.radii}, reverse=True))


def _needed(settings: Certification, radius: float) -> int:
    """The fewest hits among n whose bound at the end certifies the radius, by bisection: bounds grow with hits."""
    low, high = 0, settings.n + 1
    while low < high:
        middle = (low + high) // 2
        level = settings.alpha / 2
        bounds = lower_bound(middle, settings.n, level), sequence_lower(middle, settings.n, level)
        if max(bounds) > 0.5 and radius_of(max(bounds), settings.sigma) >= radius:
            high = middle
        else:
            low = middle + 1
    return low
