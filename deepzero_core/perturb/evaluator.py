"""What an estimator asks of a module: a base pass, and loss differences under perturbations of its parameters.

    evaluator = prepare(module, inputs, targets, loss_fn)
    base = evaluator.base(parameters, buffers, inputs, targets)
    losses = evaluator.coordinates(base, chunk, step)      # l(θ + step·eᵢ) − l(θ) for the chunk's coordinates i: [P]

An evaluator holds for one set of shapes and one train/eval mode; values may change from step to step.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepzero_core.errors import BlackBoxError
from deepzero_core.perturb.cost import Cost, total
from deepzero_core.perturb.objective import LossFn, RandomState, preserved_random_state, state_of
from deepzero_core.perturb.trace import UntraceableError, trace


@dataclass(frozen=True)
class BasePass:
    """The unperturbed pass: l(θ), the outputs, the buffers as the pass leaves them, and what the evaluator caches."""

    loss: Tensor
    outputs: Any
    buffers: dict[str, Tensor]
    parameters: Mapping[str, Tensor]
    cache: Any
    random_state: RandomState


@dataclass(frozen=True)
class Chunk:
    """Coordinates of one parameter that are evaluated together: flat indices into it, [P]."""

    name: str
    indices: Tensor


@dataclass(frozen=True)
class Situation:
    """What an evaluator holds for; values may change, these may not."""

    modes: tuple[bool, ...]
    inputs: tuple[torch.Size, torch.dtype, torch.device]
    targets: tuple[torch.Size, torch.dtype, torch.device]
    loss_fn: LossFn

    @classmethod
    def of(cls, module: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> "Situation":
        modes = tuple(part.training for part in module.modules())
        seen, wanted = ((tensor.shape, tensor.dtype, tensor.device) for tensor in (inputs, targets))
        return cls(modes, seen, wanted, loss_fn)


class Evaluator(Protocol):
    """Loss differences of a module under perturbations."""

    @property
    def situation(self) -> Situation: ...

    @property
    def untraced(self) -> str | None:
        """Why the module could not be traced and is run once per perturbation; None where it was traced."""
        ...

    def base(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> BasePass: ...

    def coordinates(self, base: BasePass, chunk: Chunk, step: float, precision: str = "float32") -> Tensor:
        """l(θ + step·eᵢ) − l(θ) for every i of the chunk, [P]; one of PRECISIONS, where the evaluator has them."""
        ...

    def chunk_size(self, base: BasePass, name: str, memory: int) -> int:
        """How many coordinates of a parameter may be evaluated together within `memory` bytes."""
        ...

    def cost(self, base: BasePass, name: str) -> dict[str, Cost]:
        """What one coordinate of a parameter costs, by stretch, but for starting operators."""
        ...

    def starts(self, base: BasePass, name: str, chunks: int) -> int:
        """How many operators an estimate starts for so many chunks of a parameter."""
        ...


def prepare(module: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> Evaluator:
    """The fastest evaluator that is right for this module: traced where it can be, one pass per perturbation otherwise.

    Warns:
        UserWarning: the module cannot be traced; says why.
    """
    from deepzero_core.perturb.engine import TracedEvaluator
    from deepzero_core.perturb.separate import SeparateEvaluator

    parameters, buffers = state_of(module)
    situation = Situation.of(module, inputs, targets, loss_fn)
    try:
        evaluator = TracedEvaluator(trace(module, parameters, buffers, inputs, targets, loss_fn), situation)
        _verify(evaluator, SeparateEvaluator(module, situation), parameters, buffers, inputs, targets)
        return evaluator
    except UntraceableError as error:
        warnings.warn(
            f"{type(module).__name__} cannot be traced ({error}): one forward pass per query",
            stacklevel=2,
        )
        return SeparateEvaluator(module, situation, untraced=str(error))


def _verify(
    traced: Evaluator,
    module: Evaluator,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> None:
    """Compare graph and module once, away from the parameters that were traced.

    A value computed outside torch's sight during tracing would stand frozen in the graph and its gradient would be
    missing without a sign.

    Raises:
        UntraceableError: they differ, or fail there.
    """
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: value + 0.01 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        for name, value in parameters.items()
    }
    with preserved_random_state() as state:
        try:
            seen = traced.base(moved, buffers, inputs, targets).loss
            state.restore()
            true = module.base(moved, buffers, inputs, targets).loss
        except BlackBoxError:
            raise
        except Exception as error:
            # The user's code again: a Cholesky factor may exist at θ and not here. See `trace`.
            raise UntraceableError(f"nothing to compare its graph with near its parameters: {error}") from error
    if not torch.allclose(seen, true, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise UntraceableError(f"its graph gives the loss {seen.item():.6g} where the module gives {true.item():.6g}")


def work_of(evaluator: Evaluator, base: BasePass, coordinates: Mapping[str, Tensor], memory: int) -> Cost:
    """What flat indices by name cost in all, perturbed once each, in the chunks that `memory` bytes allow."""
    parts = {}
    for name, indices in coordinates.items():
        if count := indices.numel():
            starts = evaluator.starts(base, name, -(-count // evaluator.chunk_size(base, name, memory)))
            parts[name] = total(evaluator.cost(base, name)) * count + Cost(starts=starts)
    return total(parts)


def within_memory(
    evaluator: Evaluator, base: BasePass, chunk: Chunk, step: float, precision: str = "float32"
) -> Tensor:
    """`Evaluator.coordinates`; where memory runs out, in halves.

    Warns:
        UserWarning: memory ran out.
    """
    try:
        return evaluator.coordinates(base, chunk, step, precision)
    except RuntimeError as error:
        size = len(chunk.indices)
        if size == 1 or not _out_of_memory(error):
            raise
        warnings.warn(
            f"out of memory with {size} coordinates of {chunk.name} at once: going on with half as many", stacklevel=2
        )
    if chunk.indices.is_cuda:
        torch.cuda.empty_cache()
    halves = chunk.indices.tensor_split(2)
    return torch.cat([within_memory(evaluator, base, Chunk(chunk.name, half), step, precision) for half in halves])


def _out_of_memory(error: RuntimeError) -> bool:
    """The CPU's allocator has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def chunks(evaluator: Evaluator, base: BasePass, coordinates: Mapping[str, Tensor], memory: int) -> Iterator[Chunk]:
    """Cut flat indices by name into chunks: a function of them and of `memory`, never of who evaluates."""
    for name, indices in coordinates.items():
        if indices.numel():
            yield from (Chunk(name, part) for part in indices.split(evaluator.chunk_size(base, name, memory)))
