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

FEWEST = 24
"""Ranges of a step: enough for eight workers to end together, few enough that sending them costs next to nothing."""
PER_WORKER = 3
"""Ranges for each of many workers: the largest is then two thirds of a worker's share."""
SHORTEST_S = 5e-3
"""A range that takes less, at the nominal peaks of a core, costs about as much to hand out as to evaluate."""


@dataclass(frozen=True)
class Range:
    """Chunks that one task evaluates: (parameter name, flat indices)."""

    chunks: tuple[tuple[str, np.ndarray], ...]


def count_for(workers: int, seconds: float) -> int:
    """Into how many ranges a step is cut that takes so many seconds at the nominal peaks of one core."""
    return max(FEWEST, min(PER_WORKER * workers, int(seconds / SHORTEST_S)))


def tapered(costs: Sequence[float], groups: int) -> list[list[int]]:
    """Split positions into at most `groups` consecutive runs, each of a smaller share of the cost than the one before.

    Shares fall linearly, (1 − (1 − k/groups)²) of the total in the first k: taken from one queue, the last ones are
    small enough for all workers to end together, and the first ones leave few tasks to be sent.
    """
    total, spent, runs = sum(costs), 0.0, []
    current: list[int] = []
    for position, cost in enumerate(costs):
        current.append(position)
        spent += cost
        share = 1 - (1 - (len(runs) + 1) / groups) ** 2
        if len(runs) + 1 < groups and spent >= total * share - 1e-12 * total:
            runs.append(current)
            current = []
    return [*runs, current] if current else runs


def divided(part: Range, pieces: int) -> list[Range]:
    """A range as at most so many of about as many chunks each."""
    pieces = min(pieces, len(part.chunks))
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
