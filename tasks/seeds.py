"""Results of several methods, each with several seeds: grouped, and as mean and spread."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class _Result(Protocol):
    @property
    def method(self) -> str: ...


R = TypeVar("R", bound=_Result)


def by_method(results: Iterable[R]) -> dict[str, list[R]]:
    """The results of all seeds under their method, in the order they came in."""
    grouped: dict[str, list[R]] = {}
    for result in results:
        grouped.setdefault(result.method, []).append(result)
    return grouped


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, 72.0±1.3; the mean alone where there is one value, or an infinite one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    spreads = len(values) > 1 and all(value < float("inf") for value in values)
    return f"{mean}±{statistics.stdev(values):.{digits}f}" if spreads else mean
