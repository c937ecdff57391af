"""Pooling. Average pooling is linear; max-pooling moves to the arg-max j' of the perturbed values, from the base's j:

    Δ = (y[j'] − y[j]) + δ[j']

which does not cancel: where the arg-max stays the first term is exactly 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Change, Replaced, dense, take
from deepzero_core.perturb.rules.registry import Call, Result, only_change, over_perturbations, rule

aten = torch.ops.aten

# Operators over the trailing axes only, by the number of these axes; every leading axis passes through.
_SPATIAL_LINEAR: dict[object, int] = {
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
    aten.reflection_pad1d.default: 1,
    aten.reflection_pad2d.default: 2,
    aten.replication_pad1d.default: 1,
    aten.replication_pad2d.default: 2,
    aten.upsample_nearest1d.default: 1,
    aten.upsample_nearest2d.default: 2,
    aten.upsample_bilinear2d.default: 2,
}


def _leading(change: Change, rank: int, trailing: int, shape: torch.Size) -> Change:
    """The change with its block on a leading axis, or dense."""
    if change.block is not None and change.block.dim < rank - trailing:
        return change
    return Change(dense(change, shape))


@rule(*_SPATIAL_LINEAR)
def spatial_linear(call: Call) -> Result:
    """Δ = f(δ)."""
    change = only_change(call)
    if change is None:
        return None
    inputs = call.args[0]
    change = _leading(change, inputs.ndim, _SPATIAL_LINEAR[call.target], inputs.shape)
    function: Callable[[Tensor], Tensor] = lambda delta: call.target(delta, *call.args[1:], **call.kwargs)  # noqa: E731
    return Change(over_perturbations(function, change.delta), change.block)


@rule(aten.max_pool2d_with_indices.default)
def max_pool2d(call: Call) -> Result:
    change = only_change(call)
    if change is None:
        return None
    inputs = call.args[0]
    # Un-pooling reads the indices, which a block could not give whole.
    change = Change(dense(change, inputs.shape)) if 1 in call.read else _leading(change, inputs.ndim, 2, inputs.shape)
    width = change.width if change.block else 0
    base = take(inputs, change.block, width)
    perturbed = base + change.delta
    if inputs.ndim == 4:
        _, folded = call.target(perturbed.flatten(0, 1), *call.args[1:])
        winners = folded.unflatten(0, perturbed.shape[:2])
    else:
        _, winners = call.target(perturbed, *call.args[1:])
    flat = winners.flatten(-2)
    moved = base.expand_as(perturbed).flatten(-2).gather(-1, flat).view_as(winners) - take(
        call.output[0], change.block, width
    )
    delta = moved + change.delta.flatten(-2).gather(-1, flat).view_as(winners)
    return Change(delta, change.block), Replaced(winners) if change.block is None else None
