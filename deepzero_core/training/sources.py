"""Where the gradient of a training step comes from: every method, zeroth or first order, on one interface."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from deepzero_core.estimators import cge, first_order, forward_gradient, rge
from deepzero_core.estimators.cge import DEFAULT_MEMORY, queries
from deepzero_core.perturb.coordinates import count, resolve
from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.perturb.evaluator import Evaluator, prepare
from deepzero_core.perturb.objective import LossFn

Coordinates = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One training step's data and where it stands: step `number`, which is batch `index` of `epoch`, all from 0.

    drawn: makes inputs and targets, when one of them is first asked for: other processes may be all that needs them.
    """

    number: int
    epoch: int
    index: int
    drawn: Callable[[], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, number: int, epoch: int, index: int, inputs: Tensor, targets: Tensor) -> "Batch":
        """One whose tensors are there."""
        return cls(number, epoch, index, lambda: (inputs, targets))

    @property
    def inputs(self) -> Tensor:
        return self._tensors[0]

    @property
    def targets(self) -> Tensor:
        return self._tensors[1]

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        return self.drawn()


class GradientSource(Protocol):
    """Estimates the gradient of a module on a batch; never changes the module."""

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        """Queries that the next estimate will spend."""
        ...

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        """The gradient at the module's present parameters."""
        ...


@dataclass
class CGESource:
    """Coordinate-wise estimation in this process. The traced evaluator is kept from step to step."""

    loss_fn: LossFn
    mu: float = 5e-3
    difference: str = "forward"
    memory: int = DEFAULT_MEMORY
    precision: str = "float32"
    _evaluator: Evaluator | None = None

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return queries(count(resolve(module, coordinates)), self.difference)

    def prepared(self, module: nn.Module, inputs: Tensor, targets: Tensor) -> Evaluator:
        """The evaluator of all steps, prepared for the shapes and modes of the first call."""
        if self._evaluator is None:
            self._evaluator = prepare(module, inputs, targets, self.loss_fn)
        return self._evaluator

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        return cge(
            module,
            batch.inputs,
            batch.targets,
            self.loss_fn,
            mu=self.mu,
            coordinates=coordinates,
            difference=self.difference,
            precision=self.precision,
            memory=self.memory,
            evaluator=self.prepared(module, batch.inputs, batch.targets),
        )


@dataclass(frozen=True)
class RGESource:
    """Randomised estimation. The directions of a step are a function of (seed, step)."""

    loss_fn: LossFn
    directions: int
    seed: int
    mu: float = 5e-3
    difference: str = "forward"

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return queries(self.directions, self.difference)

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        return rge(
            module,
            batch.inputs,
            batch.targets,
            self.loss_fn,
            queries=self.directions,
            mu=self.mu,
            generator=step_generator(self.seed, batch.number),
            difference=self.difference,
        )


@dataclass(frozen=True)
class ForwardGradientSource:
    """Exact directional derivatives along the directions that `RGESource` would take."""

    loss_fn: LossFn
    directions: int
    seed: int

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return 1 + self.directions

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        return forward_gradient(
            module,
            batch.inputs,
            batch.targets,
            self.loss_fn,
            queries=self.directions,
            generator=step_generator(self.seed, batch.number),
        )


@dataclass(frozen=True)
class FirstOrderSource:
    """Backpropagation; with coordinates, the exact gradient restricted to them: the ceiling of sparse estimation."""

    loss_fn: LossFn

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return 1

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        exact = first_order(module, batch.inputs, batch.targets, self.loss_fn)
        if coordinates is None:
            return exact
        return replace(exact, gradients=restrict(exact.gradients, resolve(module, coordinates)))


def restrict(gradients: Mapping[str, Tensor], coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient at the given flat indices, zero elsewhere."""
    kept = {}
    for name, gradient in gradients.items():
        sparse = torch.zeros_like(gradient).view(-1)
        if name in coordinates:
            sparse[coordinates[name]] = gradient.reshape(-1)[coordinates[name]]
        kept[name] = sparse.view_as(gradient)
    return kept


def step_generator(seed: int, *counters: int) -> torch.Generator:
    """A generator that is a function of (seed, counters): what a resumed run draws is what the first would have."""
    mixed = seed & 0xFFFFFFFFFFFFFFFF
    for counter in counters:
        # splitmix64 (Steele et al. 2014), one round per counter: neighbouring counters give unrelated seeds.
        mixed = (mixed + 0x9E3779B97F4A7C15 * (counter + 1)) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)
