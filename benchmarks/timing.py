"""How long an estimate takes, measured on the whole of it or on parts.

    whole     seconds of one call with every coordinate
    sampled   t(nothing) + Σ_parts t₁(part) + t₂(part)·(coordinates the part stands for / |part| − 1)

where t makes a base pass; t₁ and t₂, the time for nothing taken off, have one. t₁ is the first time, with all that a
parameter needs once, t₂ the second; a contender without base passes of its own is timed once.

Contenders take turns, so that whatever disturbs the machine disturbs them all.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import Slopes
from benchmarks.problem import Coordinates, evenly

Clock = Callable[[], float]
PEAK_SIZE = 2048


@dataclass(frozen=True)
class Part:
    """Coordinates of one parameter on which the time is taken that `stands_for` of them need."""

    name: str
    indices: Tensor
    stands_for: int


@dataclass(frozen=True, eq=False)
class Contender:
    """A way to estimate slopes, and what is timed of it: `parts`, or all of `coordinates` where parts is empty.

    prepared: estimates slopes from a base pass that is there, for timing parts; None where `slopes` does so itself.
    """

    name: str
    slopes: Slopes
    coordinates: Coordinates
    parts: tuple[Part, ...]
    prepared: Slopes | None = None

    @property
    def sampled(self) -> str | None:
        """What was timed in place of the whole, in words."""
        if not self.parts:
            return None
        timed, total = (sum(sizes) for sizes in zip(*((len(p.indices), p.stands_for) for p in self.parts), strict=True))
        return f"{timed:,} of {total:,} coordinates in {len(self.parts)} parts"

    def seconds(self, clock: Clock) -> float:
        """Seconds of one full estimate, measured or scaled."""
        if not self.parts:
            return _seconds(lambda: self.slopes(self.coordinates), clock)
        nothing = {self.parts[0].name: self.parts[0].indices[:0]}
        total, prepared = _seconds(lambda: self.slopes(nothing), clock), self.prepared or self.slopes
        empty = _seconds(lambda: prepared(nothing), clock)
        for part in self.parts:
            run = partial(prepared, {part.name: part.indices})
            first = again = max(0.0, _seconds(run, clock) - empty)
            if self.prepared is not None:
                again = max(0.0, _seconds(run, clock) - empty)
            total += first + again * (part.stands_for / len(part.indices) - 1)
        return total

    def whole(self) -> "Contender":
        return replace(self, parts=())


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one contender, seconds per full estimate."""

    seconds: tuple[float, ...]
    sampled: str | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest − fastest)/median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def by_parameter(coordinates: Coordinates, size: Callable[[str], int]) -> tuple[Part, ...]:
    """A run of up to size(name) coordinates from the middle of each parameter's, for all of them."""
    parts = []
    for name, indices in coordinates.items():
        count = min(len(indices), size(name))
        start = (len(indices) - count) // 2
        parts.append(Part(name, indices[start : start + count], len(indices)))
    return tuple(part for part in parts if part.stands_for)


def by_group(coordinates: Coordinates, groups: int, size: int) -> tuple[Part, ...]:
    """Evenly spaced coordinates of the largest parameter in each of `groups` runs of parameters, for all of the run."""
    names = [name for name, indices in coordinates.items() if len(indices)]
    parts = []
    for run in torch.arange(len(names)).tensor_split(min(groups, len(names))):
        members = [names[i] for i in run.tolist()]
        largest = max(members, key=lambda name: len(coordinates[name]))
        stands_for = sum(len(coordinates[name]) for name in members)
        parts.append(Part(largest, evenly(coordinates[largest], size), stands_for))
    return tuple(parts)


def settled(contender: Contender, limit: float, clock: Clock) -> tuple[Contender, float]:
    """The contender, warmed up, to be timed whole where that takes up to `limit` seconds; and the seconds of a turn."""
    for _ in range(2):  # the first pass may have compiled something
        started = clock()
        expected = contender.seconds(clock)
        spent = clock() - started
        if expected <= limit:
            return contender.whole(), expected
        if expected > 4 * limit:
            break
    return contender, spent


def in_turns(
    contenders: Sequence[Contender], repeats: int, clock: Clock, progress: Callable[[int, Contender], None]
) -> dict[str, Timing]:
    """Every contender `repeats` times, one after the other, and that again."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for repeat in range(repeats):
        for contender in contenders:
            progress(repeat, contender)
            seconds[contender.name].append(contender.seconds(clock))
    return {one.name: Timing(tuple(seconds[one.name]), one.sampled) for one in contenders}


def clock_of(device: torch.device) -> Clock:
    """Seconds when everything asked of the device is done."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def peak_flops(device: torch.device, repeats: int = 5) -> float:
    """Floating-point operations per second of a float32 product of two 2048×2048 matrices, the median of a few."""
    clock = clock_of(device)
    left, right = torch.randn(2, PEAK_SIZE, PEAK_SIZE, device=device)
    left @ right
    return 2 * PEAK_SIZE**3 / statistics.median(_seconds(lambda: left @ right, clock) for _ in range(repeats))


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    started = clock()
    run()
    return clock() - started
