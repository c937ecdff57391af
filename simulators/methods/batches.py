"""Training batches of the loop, and loops that grow longer in the course of a training.

A batch is a function of (seed, number of the step): the data are gone through in a new random order each time. What
the trainer takes for an epoch is the life of a mask, `redraw` steps.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from deepzero_core.errors import RequestError
from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.training.sources import Batch, Coordinates, GradientSource, step_generator
from simulators.cases import Case
from simulators.methods.sources import Loop
from simulators.methods.windows import Windows

_ORDER = 11


class Examples(Protocol):
    """What batches are taken from, by position."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Pairs:
    """The pairs of NON: `Windows.pairs`."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices)
        return self.inputs[rows], self.targets[rows]


@dataclass(frozen=True)
class Shuffled:
    """Batches of `size` examples, each once before any comes again.

    shorten: what becomes of the batch of a step; by default nothing.
    RequestError: fewer examples than a batch needs.
    """

    examples: Examples
    size: int
    seed: int
    redraw: int = 1
    shorten: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda step, inputs, targets: (inputs, targets)

    def __post_init__(self) -> None:
        if not 1 <= self.size <= len(self.examples):
            raise RequestError(f"a batch of {self.size} cannot be filled from {len(self.examples)} training windows")

    @property
    def steps_per_epoch(self) -> int:
        return self.redraw

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        step = epoch * self.redraw + index
        round_, place = divmod(step, len(self.examples) // self.size)
        order = torch.randperm(len(self.examples), generator=step_generator(self.seed, _ORDER, round_))
        chosen: list[int] = order[place * self.size : (place + 1) * self.size].tolist()
        return self.shorten(step, *self.examples.batch(chosen))


class Curriculum:
    """Loops of growing length: (steps, m) one after the other; the last goes on for ever. A gradient source.

    source: the method, from a loop. Windows are those of the longest loop, of which a shorter one sees the beginning.
    """

    def __init__(self, loop: Loop, stages: Sequence[tuple[int, int]], source: Callable[[Loop], GradientSource]) -> None:
        self._ends = list(itertools.accumulate(steps for steps, _ in stages))
        loops = [Loop(loop.simulator, loop.coupling, unroll, loop.penalty) for _, unroll in stages]
        self._sources = [source(each) for each in loops]
        self._lengths = [each.steps for each in loops]
        self._state, self._params = loop.packed.state.size, loop.packed.params.size

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return self._sources[-1].cost(module, coordinates)

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        return self._sources[self._stage(batch.number)].estimate(module, batch, coordinates)

    def shorten(self, step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the loop of that step sees of a window."""
        unroll = self._lengths[self._stage(step)]
        return inputs[:, : self._state + unroll * self._params], targets[:, :unroll]

    def _stage(self, step: int) -> int:
        return min(sum(step >= end for end in self._ends), len(self._ends) - 1)


def training_windows(loop: Loop, stages: Sequence[tuple[int, int]], cases: Sequence[Case]) -> Windows:
    """Windows of the longest loop of a curriculum."""
    longest = max(unroll for _, unroll in stages)
    return Windows(Loop(loop.simulator, loop.coupling, longest, loop.penalty), cases)
