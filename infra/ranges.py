"""Which coordinates a task evaluates.

Chunks are what is computed, and follow from the network, the coordinates and the memory budget alone. Ranges are how
chunks are handed out, and may follow the number of workers: no bit depends on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

FEW = 4
"""Ranges for each of few workers, of shrinking size: the last is small enough for all to end together."""
ENOUGH = 24
"""Ranges of a step, however long it is, that word of it keeps coming."""
WORD_S = 1.0
"""Seconds of a range where fewer would do."""
PER_WORKER = 3
"""Ranges for each of many workers: the largest is then two thirds of a worker's share."""
HANDLING_S = 1e-3
"""What a task costs the coordinator, which handles one at a time (`python -m benchmarks scaling`)."""
MUCH = 32 << 20
"""Bytes of θ, in all its copies, that one worker sends to the others: more of them are sent by several."""


@dataclass(frozen=True)
class Range:
    """Chunks that one task evaluates: (parameter name, flat indices)."""

    chunks: tuple[tuple[str, np.ndarray], ...]


def grouped(costs: Sequence[float], workers: int) -> list[list[int]]:
    """Positions of chunks by range, for so many workers; costs: seconds of each chunk on one core.

    n ranges take the coordinator n·h, and one of them a worker S/n where there are workers for all: the sum is least
    for n = √(S/h). More are not worth it, however many workers there are, and there each gets one of n equal ranges.
    Few workers get few ranges, but one for every second, so that word of a step keeps coming. The costliest chunks
    come first: what is left for the end is small. One worker has nobody to end together with.
    """
    word = min(ENOUGH, round(sum(costs) / WORD_S))
    if workers <= 1:
        return even(costs, max(1, word))
    fewest = max(word, min(ENOUGH, FEW * workers))
    wanted = max(fewest, min(PER_WORKER * workers, int((sum(costs) / HANDLING_S) ** 0.5)))
    order = sorted(range(len(costs)), key=lambda position: -costs[position])
    ordered = [costs[position] for position in order]
    runs = tapered(ordered, wanted) if wanted > workers else even(ordered, wanted)
    return [[order[place] for place in run] for run in runs]


def even(costs: Sequence[float], groups: int) -> list[list[int]]:
    """Split positions into at most `groups` consecutive runs of about the same cost."""
    return _split(costs, [(k + 1) / groups for k in range(groups)])


def tapered(costs: Sequence[float], groups: int) -> list[list[int]]:
    """Split positions into at most `groups` consecutive runs, each of a smaller share of the cost than the one before.

    Shares fall linearly, (1 − (1 − k/groups)²) of the total in the first k: taken from one queue, the last ones are
    small enough for all workers to end together, and the first ones leave few tasks to be sent.
    """
    return _split(costs, [1 - (1 - (k + 1) / groups) ** 2 for k in range(groups)])


def _split(costs: Sequence[float], shares: Sequence[float]) -> list[list[int]]:
    """Runs of positions that end where their share of the total is reached."""
    total, spent, runs = sum(costs), 0.0, []
    current: list[int] = []
    for position, cost in enumerate(costs):
        current.append(position)
        spent += cost
        if len(runs) + 1 < len(shares) and spent >= total * (shares[len(runs)] - 1e-12):
            runs.append(current)
            current = []
    return [*runs, current] if current else runs


def paces(ranges: Sequence[Range], seconds: Sequence[Sequence[float]]) -> dict[str, float]:
    """By parameter, seconds of a coordinate; of several chunks the fastest: their worker may be a slow one."""
    found: dict[str, float] = {}
    for part, times in zip(ranges, seconds, strict=True):
        for (name, indices), spent in zip(part.chunks, times, strict=True):
            found[name] = min(found.get(name, float("inf")), spent / len(indices))
    return found


def copies_for(workers: int, theta: int) -> int:
    """How many workers have θ, of so many bytes, before the others fetch it from them: all send it equally often."""
    return max(1, round(workers**0.5)) if workers * theta > MUCH else 1


def divided(part: Range, pieces: int) -> list[Range]:
    """A range as at most so many of about as many chunks each."""
    pieces = max(1, min(pieces, len(part.chunks)))
    bounds = [len(part.chunks) * piece // pieces for piece in range(pieces + 1)]
    return [Range(part.chunks[start:end]) for start, end in pairwise(bounds)]


def joined(ranges: Sequence[Range], results: Sequence[Sequence[np.ndarray]]) -> dict[str, Tensor]:
    """By parameter, what the ranges found, in the order of its coordinates."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for part, values in zip(ranges, results, strict=True):
        for (name, indices), value in zip(part.chunks, values, strict=True):
            found.setdefault(name, []).append((int(indices[0]), value))
    ordered = {name: sorted(parts, key=lambda part: part[0]) for name, parts in found.items()}
    return {name: torch.from_numpy(np.concatenate([v for _, v in parts])) for name, parts in ordered.items()}
