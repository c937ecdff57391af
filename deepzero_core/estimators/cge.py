"""Coordinate-wise gradient estimation (CGE).

    forward:   ĝᵢ = [l(θ + μeᵢ) − l(θ)]/μ              error O(μ),  one query per coordinate and the base
    central:   ĝᵢ = [l(θ + μeᵢ) − l(θ − μeᵢ)]/2μ       error O(μ²), two queries per coordinate and the base

Source: DeepZero (Chen et al., ICLR 2024), section 3.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deepzero_core.errors import RequestError
from deepzero_core.perturb.coordinates import count, resolve, scatter
from deepzero_core.perturb.cost import Cost
from deepzero_core.perturb.estimate import GradientEstimate, check_arguments
from deepzero_core.perturb.evaluator import (
    BasePass,
    Chunk,
    Evaluator,
    Situation,
    chunks,
    prepare,
    within_memory,
    work_of,
)
from deepzero_core.perturb.objective import LossFn, state_of

DEFAULT_MEMORY = 32 << 20
"""Bytes of changes held at once: enough to fill the vector units, little enough for the caches of most machines."""


def cge(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    mu: float = 5e-3,
    coordinates: Mapping[str, Tensor] | None = None,
    difference: str = "forward",
    precision: str = "float32",
    memory: int = DEFAULT_MEMORY,
    evaluator: Evaluator | None = None,
) -> GradientEstimate:
    """Estimate the gradient of loss_fn(module(inputs), targets) one coordinate at a time, many at once.

    The module is only read: parameters, buffers, gradients and modes stay as they are, also when this raises.

    Args:
        module: any module; in training mode BatchNorm uses each query's own batch statistics.
        inputs: [B, …].
        targets: [B, …].
        loss_fn: (outputs, targets) → mean loss, or one loss per example [B].
        mu: the smoothing parameter μ, in units of the parameters.
        coordinates: None (all trainable) or, by parameter name, a boolean mask or flat indices.
        difference: "forward" or "central".
        precision: "float32", "bfloat16" or "value"; see `PRECISIONS`.
        memory: bytes of changes that may be held at once.
        evaluator: of an earlier `prepare` with the same module, shapes and mode; None prepares one.

    Raises:
        RequestError: unknown parameter, mask of the wrong shape, mu ≤ 0, unknown difference or precision, or an
            evaluator that was prepared for something else.
    """
    check_arguments(mu, difference, precision)
    chosen = resolve(module, coordinates)
    parameters, buffers = state_of(module)
    if evaluator is None:
        evaluator = prepare(module, inputs, targets, loss_fn)
    elif evaluator.situation != Situation.of(module, inputs, targets, loss_fn):
        raise RequestError(
            "the evaluator was prepared for another loss function, other shapes or another train/eval mode: "
            "prepare one for each"
        )
    base = evaluator.base(parameters, buffers, inputs, targets)
    slopes: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for chunk in chunks(evaluator, base, chosen, memory):
        slopes[chunk.name].append(slope(evaluator, base, chunk, mu, difference, precision))
    values = {name: torch.cat(parts) for name, parts in slopes.items() if parts}
    return GradientEstimate(
        scatter(parameters, chosen, values),
        queries(count(chosen), difference),
        base.loss.item(),
        base.outputs,
        base.buffers,
        work(evaluator, base, chosen, difference, memory),
    )


def slope(
    evaluator: Evaluator, base: BasePass, chunk: Chunk, mu: float, difference: str, precision: str = "float32"
) -> Tensor:
    """ĝ at the chunk's coordinates: [P]."""
    above = within_memory(evaluator, base, chunk, mu, precision)
    if difference == "central":
        return (above - within_memory(evaluator, base, chunk, -mu, precision)) / (2 * mu)
    return above / mu


def work(evaluator: Evaluator, base: BasePass, coordinates: Mapping[str, Tensor], difference: str, memory: int) -> Cost:
    """What an estimate of these coordinates costs beside its base pass."""
    return work_of(evaluator, base, coordinates, memory) * (2 if difference == "central" else 1)


def queries(coordinates: int, difference: str) -> int:
    """Loss evaluations that an estimate of so many coordinates spends, the base one included."""
    return 1 + coordinates * (2 if difference == "central" else 1)
