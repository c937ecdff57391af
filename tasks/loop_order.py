"""Whether the errors are in the order that the paper found: SRC > NON > SOL-ZO ≥ SOL-FO, every pair of it.

Two methods are compared seed by seed, as both begin with the same corrector: of their differences the mean has to be
larger than the standard deviation. Of SOL-ZO and SOL-FO only the opposite is asked: SOL-FO must not be worse by that
measure.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import combinations

from tasks.loop_plots import LOOP_NAMES, Grouped
from tasks.records import LoopResult
from tasks.seeds import spread

ORDER = ("src", "non", "sol-zo", "sol-fo")
"""From the largest to the smallest error."""


def errors(several: Sequence[LoopResult]) -> list[float]:
    """By seed: the mean over the test cases of the mean absolute error over time."""
    return [statistics.mean(result.rolled.mae) for result in several]


def gains(grouped: Grouped, worse: str, better: str) -> list[float]:
    """By seed: how much smaller the error of the second method is; SRC is the same for every seed."""
    high, low = errors(grouped[worse]), errors(grouped[better])
    if worse == "src":
        high = high[:1] * len(low)
    return [one - other for one, other in zip(high, low, strict=True)]


def order_notes(grouped: Grouped) -> tuple[list[str], list[str]]:
    """Sentences on the order: (that it holds, if it does; one for every pair of methods for which it does not)."""
    methods = [method for method in ORDER if method in grouped]
    broken = [sentence for pair in combinations(methods, 2) if (sentence := _broken(grouped, *pair))]
    if broken or len(methods) < 2:
        return [], broken
    claim = " > ".join(LOOP_NAMES[method] for method in methods).replace("SOL-ZO > SOL-FO", "SOL-ZO ≥ SOL-FO")
    seeds = max(len(grouped[method]) for method in methods)
    return [f"{claim} holds{f' with {seeds} seeds, for every pair beyond its spread' if seeds > 1 else ''}."], []


def _broken(grouped: Grouped, worse: str, better: str) -> str | None:
    """What is to be said of a pair that is not in order, or not clearly."""
    names = LOOP_NAMES[better], LOOP_NAMES[worse]
    high, low = errors(grouped[worse]), errors(grouped[better])
    compared = f"{names[0]} ({spread(low, 4)}) is not below that of {names[1]} ({spread(high, 4)})"
    found = gains(grouped, worse, better)
    mean = statistics.mean(found)
    if not math.isfinite(mean):  # an error without bound
        return None if mean > 0 else f"The error of {compared}."
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    if (worse, better) == ("sol-zo", "sol-fo"):
        return None if mean >= -deviation else f"The error of {compared}."
    if mean > deviation:
        return None
    if mean > 0:
        return (
            f"The error of {names[0]} ({spread(low, 4)}) is below that of {names[1]} ({spread(high, 4)}) by no more "
            f"than the spread of their difference ({spread(found, 4)})."
        )
    return f"The error of {compared}."
