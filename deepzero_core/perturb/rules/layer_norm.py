"""Layer and group normalisation; m and v are mean and variance over one group of an example's values, x̂ = y − m,
s = (v + ε)^−½.

    Δm = mean δ,   Δv = mean((2x̂ + δ)·δ) − Δm²,   s' = (v + Δv + ε)^−½,   Δs = −Δv·s²·s'²/(s + s')
    input moves by δ:    Δ = γ·(s'·(δ − Δm) + Δs·x̂)
    γ moves by δ:        Δ = δ·x̂·s
    β moves by δ:        Δ = δ

Examples and groups do not meet: a block along another axis stays a block. A block within a group takes its own values
for the statistics, and moves its group: all of a layer's values, or a block of channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Block, Change, OneHot, dense, take
from deepzero_core.perturb.native import dense as native
from deepzero_core.perturb.rules.elementwise import product_of_two, sum_of_two
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule

aten = torch.ops.aten


@dataclass(frozen=True)
class _Normalised:
    """Base values: x̂ and γ in the shape of the input [*s], s broadcastable to it; the axes of a group and its size."""

    centred: Tensor
    scale: Tensor
    gain: Tensor
    axes: Sequence[int]
    size: int


@rule(aten.native_layer_norm.default)
def layer_norm(call: Call) -> Result:
    inputs, trailing = call.args[0], len(call.args[1])
    if call.read - {0} or not inputs.numel():
        return None
    gamma, (_, mean, scale) = call.argument(2), call.output
    centred = call.once("centred", lambda: inputs - mean)
    if call.changed() != (0,):
        return _affine(call, 2, centred * scale, [])
    change = only_change(call)
    if change is None:
        return None
    known = (centred, scale) if gamma is None else (centred, scale, gamma)
    of_features = trailing == 1 and change.block is not None and change.block.dim == inputs.ndim - 1
    if (change.block is None or of_features) and native.suits(change.delta, *known):
        starts = change.block.start if change.block else (0,) * call.count
        return Change(native.layer_norm(change.delta, starts, centred, scale, gamma)), None, None
    gain = (inputs.new_ones([]) if gamma is None else gamma).expand(inputs.shape)
    axes = range(inputs.ndim - trailing, inputs.ndim)
    base = _Normalised(centred, scale, gain, axes, prod(call.args[1]))
    crosses = change.block is not None and change.block.dim in axes
    moved = _spread(base, change, None, 0) if crosses else _moved(base, change)
    return replace(moved, delta=moved.delta.to(inputs.dtype)), None, None


@rule(aten.native_group_norm.default)
def group_norm(call: Call) -> Result:
    inputs, gamma, groups = call.args[0], call.args[1], call.args[6]
    if call.read - {0} or not inputs.numel():
        return None
    column = [1] * (inputs.ndim - 2)
    members = inputs.shape[1] // groups
    mean, scale = (value.repeat_interleave(members, 1).unflatten(1, (-1, *column)) for value in call.output[1:])
    centred = call.once("centred", lambda: inputs - mean)
    if call.changed() != (0,):
        return _affine(call, 1, centred * scale, column)
    change = only_change(call)
    if change is None:
        return None
    gain = (inputs.new_ones(inputs.shape[1]) if gamma is None else gamma).view(-1, *column).expand(inputs.shape)
    size = members * prod(inputs.shape[2:])
    moved = _group_of_channels(_Normalised(centred, scale, gain, range(1, inputs.ndim), size), change, members)
    if moved is None:
        whole = Change(dense(change, inputs.shape)) if change.block and change.block.dim else change
        apart = [value.unflatten(1, (groups, -1)) for value in (centred, scale, gain)]
        base = _Normalised(apart[0], apart[1].narrow(2, 0, 1), apart[2], range(2, inputs.ndim + 1), size)
        moved = _moved(base, Change(whole.delta.unflatten(2, (groups, -1)), whole.block))
        moved = replace(moved, delta=moved.delta.flatten(2, 3))
    return replace(moved, delta=moved.delta.to(inputs.dtype)), None, None


def _group_of_channels(base: _Normalised, change: Change, members: int) -> Change | None:
    """Where each perturbation changes channels of one group: the change of that group."""
    if change.block is None or change.block.dim != 1:
        return None
    first = tuple(start // members * members for start in change.block.start)
    if any(start + change.width > group + members for start, group in zip(change.block.start, first, strict=True)):
        return None
    return _spread(base, change, Block(1, first), members)


def _statistics(base: _Normalised, delta: Tensor, centred: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Δm, s' and Δs, with axes of length 1."""
    axes = [1 + axis for axis in base.axes]
    mean = delta.sum(axes, keepdim=True) / base.size
    variance = (torch.add(delta, centred, alpha=2) * delta).sum(axes, keepdim=True) / base.size - mean.square()
    moved = (scale.square().reciprocal() + variance).rsqrt()
    return mean, moved, -variance * (scale * moved).square() / (scale + moved)


def _moved(base: _Normalised, change: Change) -> Change:
    """A change of whole groups, dense or on a block of them."""
    width = change.width if change.block else 0
    centred, gain = (take(value, change.block, width) for value in (base.centred, base.gain))
    scale = take(base.scale, change.block, width)
    mean, moved, rescale = _statistics(base, change.delta, centred, scale)
    return Change(gain * torch.addcmul(moved * (change.delta - mean), rescale, centred), change.block)


def _spread(base: _Normalised, change: Change, span: Block | None, width: int) -> Change:
    """A block of changed values within the group that `span`, `width` wide, covers along the block's axis."""
    block = change.block
    assert block is not None
    single = block if base.scale.shape[block.dim] > 1 else None
    mean, moved, rescale = _statistics(
        base, change.delta, take(base.centred, block, change.width), take(base.scale, single, 1)
    )
    centred, gain = take(base.centred, span, width), take(base.gain, span, width)
    indirect = gain * torch.addcmul(-moved * mean, rescale, centred)
    within = tuple(a - b for a, b in zip(block.start, span.start, strict=True)) if span else block.start
    direct = Change(take(base.gain, block, change.width) * moved * change.delta, Block(block.dim, within))
    shape = list(base.centred.shape)
    shape[block.dim] = width or shape[block.dim]
    return Change(indirect.add_(dense(direct, torch.Size(shape))), span)


def _affine(call: Call, position: int, normalised: Tensor, column: Sequence[int]) -> Result:
    """γ, at `position` of the operands, or β behind it moves: n·γ + β with both reshaped to [-1, *column]."""
    if call.changed() not in ((position,), (position + 1,)):
        return None
    (moving,) = call.changed()
    parameter, change = call.args[moving], call.change(moving)
    if column and isinstance(change, Change):
        change = replace(change, delta=change.delta.reshape(*change.delta.shape, *column))
    if not isinstance(change, (Change, OneHot)):
        return None
    other, target, combine = (
        (normalised, aten.mul.Tensor, product_of_two)
        if moving == position
        else (call.output[0], aten.add.Tensor, sum_of_two)
    )
    operands = (other, parameter.view(-1, *column) if column else parameter)
    combined = replace(call, target=target, args=operands, kwargs={}, changes=(None, change), output=call.output[0])
    moved = combine(combined)
    return (moved, None, None) if isinstance(moved, Change) else None
