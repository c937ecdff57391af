"""Sums and means, and other operators linear in their first operand: Δ = f(δ), nothing cancels.

A loss is a mean: its difference must be the mean of the differences. The difference of two means near 2 would leave a
float32 gradient two digits.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import AnyChange, Block, Change, OneHot, Replaced, dense
from deepzero_core.perturb.rules.registry import Call, Result, only_change, over_perturbations, rule

aten = torch.ops.aten


@rule(aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default)
def sum_or_mean(call: Call) -> Result:
    """Δ = Σ δ (÷ the number of elements); a block that is summed over leaves a dense result."""
    change = only_change(call)
    inputs: Tensor = call.args[0]
    if change is None or call.kwargs.get("dtype") not in (None, inputs.dtype) or not inputs.is_floating_point():
        return None
    axes = sorted(axis % max(inputs.ndim, 1) for axis in call.argument(1) or range(inputs.ndim))
    keep = bool(call.argument(2, False))
    total = change.delta.sum([1 + axis for axis in axes], keepdim=keep) if axes else change.delta
    if call.target in (aten.mean.dim, aten.mean.default):
        total = total / max(_count(inputs, axes), 1)
    block = change.block
    if block is not None and block.dim in axes:
        block = None
    elif block is not None and not keep:
        block = Block(block.dim - sum(axis < block.dim for axis in axes), block.start)
    return Change(total, block)


def _count(inputs: Tensor, axes: list[int]) -> int:
    count = 1
    for axis in axes:
        count *= inputs.shape[axis]
    return count


_LINEAR_IN_FIRST = (
    aten.cumsum.default,
    aten.flip.default,
    aten.roll.default,
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
    """Δ = concatenation of the differences; one changed operand that is a block along the axis only shifts."""
    tensors, changes = call.args[0], call.changes[0]
    if any(tensor.ndim != call.output.ndim or tensor.dtype != call.output.dtype for tensor in tensors):
        return None
    axis = call.argument(1, 0) % call.output.ndim
    moving = [i for i, change in enumerate(changes) if change is not None]
    if len(moving) == 1 and isinstance(changes[moving[0]], Change):
        change = changes[moving[0]]
        offset = sum(tensor.shape[axis] for tensor in tensors[: moving[0]])
        if change.block is None:
            return Change(change.delta, Block(axis, (offset,) * call.count))
        if change.block.dim == axis:
            return Change(change.delta, replace(change.block, start=tuple(s + offset for s in change.block.start)))
    return _joined(call)


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
