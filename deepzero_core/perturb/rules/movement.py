"""Operators that only move elements: views, transposes, slices, copies.

one-hot change:   the element is found at its new place
block:            its axis is followed; where it is cut or merged beyond recognition the change becomes dense
otherwise:        Δ = f(δ)
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from deepzero_core.perturb.changes import AnyChange, Block, Change, OneHot, Replaced, dense
from deepzero_core.perturb.rules.registry import Call, Result, over_perturbations, rule

aten = torch.ops.aten

_PERMUTATIONS = (aten.t.default, aten.transpose.int, aten.permute.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default)
_COPIES = (aten.clone.default, aten.detach.default)
_SELECTIONS = (
    aten.slice.Tensor,
    aten.select.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.unfold.default,
    aten.diagonal.default,
)


def _moved(call: Call, tensor: Tensor) -> Tensor:
    result: Tensor = call.target(tensor, *call.args[1:], **call.kwargs)
    return result


def _everywhere(call: Call, change: AnyChange) -> AnyChange:
    """The operator applied to every perturbation's whole tensor."""
    if isinstance(change, Replaced):
        return Replaced(over_perturbations(lambda value: _moved(call, value), change.value))
    return Change(over_perturbations(lambda delta: _moved(call, delta), dense(change, call.args[0].shape)))


def _follow(call: Call, change: OneHot) -> OneHot:
    """Where each element lies afterwards; the step becomes 0 where it is cut away."""
    base: Tensor = call.args[0]
    source = _moved(call, torch.arange(base.numel(), device=base.device).view(base.shape)).flatten()
    place = torch.full([base.numel()], -1, device=base.device)
    place[source] = torch.arange(source.numel(), device=base.device)
    positions = place[change.positions]
    return OneHot(positions.clamp(min=0), torch.where(positions < 0, 0, change.steps))


@rule(*_COPIES)
def copies(call: Call) -> Result:
    return call.change(0)


@rule(*_PERMUTATIONS)
def permutations(call: Call) -> Result:
    change = call.change(0)
    if isinstance(change, OneHot):
        return _follow(call, change)
    if not isinstance(change, Change) or change.block is None:
        return _everywhere(call, change) if change is not None else None
    # A tensor of axis lengths 1 with one marked axis shows where the operator puts that axis.
    marked = torch.empty([2 if axis == change.block.dim else 1 for axis in range(call.args[0].ndim)])
    dim = _moved(call, marked).shape.index(2)
    delta = over_perturbations(lambda delta: _moved(call, delta), change.delta)
    return Change(delta, replace(change.block, dim=dim))


@rule(*_RESHAPES)
def reshapes(call: Call) -> Result:
    change = call.change(0)
    if isinstance(change, OneHot):
        return change
    old, new = call.args[0].shape, call.output.shape
    if isinstance(change, Replaced):
        return Replaced(change.value.reshape(call.count, *new))
    if change is None:
        return None
    found = _reshaped_block(old, new, change.block.dim) if change.block else None
    if change.block is None or found is None:
        return Change(dense(change, old).reshape(call.count, *new))
    dim, factor = found
    start = tuple(first * factor for first in change.block.start)
    sizes = [change.count, *new[:dim], change.width * factor, *new[dim + 1 :]]
    return Change(change.delta.reshape(sizes), Block(dim, start))


def _reshaped_block(old: torch.Size, new: torch.Size, dim: int) -> tuple[int, int] | None:
    """The axis that holds old axis `dim` afterwards, and how many new elements each of its elements spans there.

    It survives when everything before it stays before it, alone or merged with axes behind it.
    """
    before, length, behind = prod(old[:dim]), old[dim], prod(old[dim + 1 :])
    for axis in range(len(new)):
        rest = prod(new[axis + 1 :])
        if prod(new[:axis]) == before and rest and behind % rest == 0 and new[axis] == length * (behind // rest):
            return axis, behind // rest
    return None


@rule(*_SELECTIONS)
def selections(call: Call) -> Result:
    change = call.change(0)
    overlapping = call.target is aten.unfold.default and call.args[2] > call.args[3]
    if isinstance(change, OneHot):
        return _everywhere(call, change) if overlapping else _follow(call, change)
    if change is None or isinstance(change, Replaced) or change.block is None:
        return _everywhere(call, change) if change is not None else None
    return _keep_block(call, change, change.block) or _everywhere(call, change)


def _keep_block(call: Call, change: Change, block: Block) -> Change | None:
    """Slices, selects and squeezes of another axis leave the block's axis whole."""
    rank = call.args[0].ndim
    delta = change.delta
    if call.target is aten.unsqueeze.default:
        axis = call.args[1] % (rank + 1)
        return Change(delta.unsqueeze(1 + axis), replace(block, dim=block.dim + (axis <= block.dim)))
    if call.target not in (aten.slice.Tensor, aten.select.int, aten.squeeze.dim):
        return None
    axis = call.argument(1, 0) % rank
    if axis == block.dim:
        return None
    removed = call.output.ndim < rank and axis < block.dim
    moved = call.target(delta, 1 + axis, *call.args[2:], **call.kwargs)
    return Change(moved, replace(block, dim=block.dim - removed))


@rule(aten.expand.default)
def expand(call: Call) -> Result:
    """An element of a one-hot change may appear many times afterwards, so that it becomes dense unless none does."""
    change = call.change(0)
    if isinstance(change, OneHot) and call.output.numel() == call.args[0].numel():
        return change
    return _everywhere(call, change) if change is not None else None


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def splits(call: Call) -> Result:
    """Every piece of the difference."""
    change = call.change(0)
    if not isinstance(change, (Change, OneHot)):
        return None
    delta = dense(change, call.args[0].shape)
    rank = call.args[0].ndim
    if call.target is aten.unbind.int:
        return tuple(Change(piece) for piece in delta.unbind(1 + call.argument(1, 0) % rank))
    return tuple(Change(piece) for piece in delta.split(call.args[1], 1 + call.argument(2, 0) % rank))
