"""Sums and means, and other operators linear in their first operand: Δ = f(δ), nothing cancels.

A loss is a mean: its difference must be the mean of the differences. The difference of two means near 2 would leave a
float32 gradient two digits.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import AnyChange, Block, Change, OneHot, Replaced, dense
from deepzero_core.perturb.rules.registry import Call, Result, only_change, over_perturbations, rule

aten = torch.ops.aten


@rule(aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default)
def sum_or_mean(call: Call) -> Result:
    """Δ = Σ δ (÷ their number: NaN where there are none); a block that is summed over leaves a dense result."""
    change = only_change(call)
    inputs: Tensor = call.args[0]
    if change is None or call.kwargs.get("dtype") not in (None, inputs.dtype) or not inputs.is_floating_point():
        return None
    axes = sorted(axis % max(inputs.ndim, 1) for axis in call.argument(1) or range(inputs.ndim))
    total = change.delta.sum([1 + axis for axis in axes], keepdim=True) if axes else change.delta
    if call.target in (aten.mean.dim, aten.mean.default):
        total = total / prod(inputs.shape[axis] for axis in axes)
    block = None if change.block and change.block.dim in axes else change.block
    return summed_over(axes, bool(call.argument(2, False)), total, block)


def summed_over(axes: Sequence[int], keep: bool, delta: Tensor, block: Block | None) -> Change:
    """The change behind a sum over axes that `delta` still has, of length 1, and that are dropped unless kept."""
    gone = sorted(axis % (delta.ndim - 1) for axis in axes)
    if keep or not gone:
        return Change(delta, block)
    if block is not None:
        block = Block(block.dim - sum(axis < block.dim for axis in gone), block.start)
    return Change(delta.squeeze([1 + axis for axis in gone]), block)


_LINEAR_IN_FIRST = (
    aten.cumsum.default,
    aten.flip.default,
    aten.roll.default,
    aten.tril.default,
    aten.triu.default,
    aten.index_select.default,
    aten.gather.default,
    aten.im2col.default,
    aten.nll_loss_forward.default,
    aten.nll_loss2d_forward.default,
)


@rule(*_LINEAR_IN_FIRST)
def linear_in_first(call: Call) -> Result:
    """Δ = f(δ); of several results (the loss and its total weight) only the first changes."""
    change = only_change(call)
    if change is None:
        return None

    def evaluate(delta: Tensor) -> Any:
        result = call.target(delta, *call.args[1:], **call.kwargs)
        return result[0] if isinstance(result, tuple) else result

    result = Change(over_perturbations(evaluate, dense(change, call.args[0].shape)))
    return result if isinstance(call.output, Tensor) else (result, *[None] * (len(call.output) - 1))


@rule(aten.constant_pad_nd.default)
def constant_pad(call: Call) -> Result:
    """The padding does not move: pad δ with zeros. Padding the block's own axis moves the block."""
    change = only_change(call)
    if change is None:
        return None
    amounts = list(call.args[1])
    block = change.block
    if block is not None:
        before = 2 * (call.args[0].ndim - 1 - block.dim)
        if before < len(amounts):
            if min(amounts[before : before + 2]) < 0:
                return None
            block = replace(block, start=tuple(start + amounts[before] for start in block.start))
            amounts[before : before + 2] = [0, 0]
    return Change(aten.constant_pad_nd.default(change.delta, amounts, 0), block)


def _delta(base: Tensor, change: AnyChange | None, count: int) -> Tensor:
    """The full difference [P, *s] of an operand; zeros where it stays."""
    if isinstance(change, (Change, OneHot)):
        return dense(change, base.shape)
    return torch.zeros_like(base).expand(count, *base.shape)


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def scatter(call: Call) -> Result:
    """Δ = scatter(δ of the destination, δ of the source), along the axis behind the perturbations."""
    if any(not isinstance(call.change(position), (Change, OneHot)) for position in call.changed()):
        return None
    destination, source = (_delta(call.args[i], call.change(i), call.count) for i in range(2))
    return Change(call.target(destination, source, 1 + call.argument(2, 0) % call.output.ndim, *call.args[3:]))


@rule(aten.copy.default)
def copy(call: Call) -> Result:
    """`copy(destination, source)` returns the source in the destination's shape: only the source matters."""
    change = call.change(1)
    if change is None:
        return Change(call.output.new_zeros([call.count, *call.output.shape]))
    if not isinstance(change, Change) or call.args[0].dtype != call.args[1].dtype:
        return None
    delta = dense(change, call.args[1].shape)
    missing = call.output.ndim - call.args[1].ndim
    padded = delta.reshape(delta.shape[0], *[1] * missing, *delta.shape[1:])
    return Change(padded.expand(-1, *call.output.shape))


@rule(aten.cat.default)
def concatenation(call: Call) -> Result:
    """Δ = concatenation of the differences. One operand that moves is a block of the result, or a part of one."""
    tensors, changes = call.args[0], call.changes[0]
    if any(tensor.ndim != call.output.ndim or tensor.dtype != call.output.dtype for tensor in tensors):
        return None
    axis = call.argument(1, 0) % call.output.ndim
    (first, *others) = (i for i, change in enumerate(changes) if change is not None)
    change, offset = changes[first], sum(tensor.shape[axis] for tensor in tensors[:first])
    if others or not isinstance(change, (Change, OneHot)):
        return _joined(call)
    if isinstance(change, OneHot):
        return _shifted(change, tensors[first].shape, call.output.shape, axis, offset)
    if change.block is not None and change.block.dim == axis:
        return Change(change.delta, replace(change.block, start=tuple(s + offset for s in change.block.start)))
    return Change(dense(change, tensors[first].shape), Block(axis, (offset,) * call.count))


def _shifted(change: OneHot, old: torch.Size, new: torch.Size, axis: int, offset: int) -> OneHot:
    """The element's place in a tensor of shape `new` that holds one of shape `old` from `offset` on along an axis."""
    places = list(torch.unravel_index(change.positions, old))
    places[axis] = places[axis] + offset
    strides = [prod(new[dim + 1 :]) for dim in range(len(new))]
    positions = torch.stack([place * stride for place, stride in zip(places, strides, strict=True)]).sum(0)
    return OneHot(positions, change.steps)


@rule(aten.stack.default)
def stacking(call: Call) -> Result:
    """Δ = stack of the differences, 0 for an operand that stays."""
    return _joined(call)


def _joined(call: Call) -> Result:
    tensors, changes = call.args[0], call.changes[0]
    if any(isinstance(change, Replaced) for change in changes):
        return None
    deltas = [_delta(tensor, change, call.count) for tensor, change in zip(tensors, changes, strict=True)]
    return Change(call.target(deltas, 1 + call.argument(1, 0) % call.output.ndim))
