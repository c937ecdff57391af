"""What h hits among t independent trials say about the probability p of a hit.

`lower_bound` holds at one number of trials that is fixed beforehand. A confidence sequence holds at all numbers of
trials at once, so that whoever looks may stop whenever the answer pleases:

    M_t(p) = B(a + h, b + t − h) / [B(a, b) pʰ (1 − p)^(t − h)]

is the likelihood of the trials, averaged over a Beta(a, b) prior, against that of p. Under p it is a non-negative
martingale that starts at 1, so that by Ville's inequality it ever reaches 1/α with probability at most α, and
{p : M_t(p) < 1/α} holds p for all t at once with probability at least 1 − α (Robbins 1970; Howard et al. 2021,
proposition 7). log M_t is convex in p and least at h/t: the set is an interval.

a and b decide how narrow it is and not whether it is right. a = 1, b = 0.1 spread the prior evenly over the orders of
magnitude of 1 − p: probabilities near 1 are those that large radii need.
"""

import math

from scipy.optimize import brentq
from scipy.special import betaincinv, ndtri

_A, _B = 1.0, 0.1
_LOG_BETA = math.lgamma(_A) + math.lgamma(_B) - math.lgamma(_A + _B)


def lower_bound(hits: int, trials: int, alpha: float) -> float:
    """Clopper–Pearson: below p with probability at least 1 − alpha, at this number of trials.

    The p at which so many hits or more have probability alpha: the alpha-quantile of Beta(hits, trials − hits + 1).
    """
    return float(betaincinv(hits, trials - hits + 1, alpha)) if hits else 0.0


def evidence_against(p: float, hits: int, trials: int) -> float:
    """log M_t(p) for 0 < p < 1; with probability at least 1 − α it stays below log 1/α for ever, if p is true."""
    misses = trials - hits
    averaged = math.lgamma(_A + hits) + math.lgamma(_B + misses) - math.lgamma(_A + _B + trials) - _LOG_BETA
    return averaged - hits * math.log(p) - misses * math.log1p(-p)


def sequence_lower(hits: int, trials: int, alpha: float) -> float:
    """The lower end of the confidence sequence at level 1 − alpha; 0 where nothing is excluded."""
    return _end(hits, trials, alpha, 0.0)


def sequence_upper(hits: int, trials: int, alpha: float) -> float:
    """The upper end; valid together with the lower one at the same level."""
    return _end(hits, trials, alpha, 1.0)


def _end(hits: int, trials: int, alpha: float, extreme: float) -> float:
    """Where log M reaches log 1/α between the mean and an end of [0, 1]."""
    tiny, limit = 1e-15, -math.log(alpha)
    mean = min(max(hits / trials if trials else 0.5, tiny), 1 - tiny)
    outer = abs(extreme - tiny)
    if trials == 0 or evidence_against(outer, hits, trials) < limit:
        return extreme
    root = float(brentq(lambda p: evidence_against(p, hits, trials) - limit, outer, mean, xtol=1e-14))
    # A root is found up to its tolerance; the interval errs on the wide side.
    return max(0.0, root - 1e-13) if extreme == 0.0 else min(1.0, root + 1e-13)


def radius_of(p_lower: float, sigma: float) -> float:
    """σ·Φ⁻¹(p), the radius that a lower bound p > ½ certifies; 0 where p ≤ ½."""
    return sigma * float(ndtri(p_lower)) if p_lower > 0.5 else 0.0
