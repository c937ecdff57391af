"""Operators that only move elements: views, transposes, slices, copies.

one-hot change:   the element is found at its new place
block:            its axis is followed, also where it is split in two or cut into pieces; where it is merged beyond
                  recognition the change becomes dense
otherwise:        Δ = f(δ)
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from deepzero_core.perturb.changes import AnyChange, Block, Change, OneHot, Replaced, dense, one_hot_block
from deepzero_core.perturb.rules.registry import Call, Result, over_perturbations, rule

aten = torch.ops.aten

_PERMUTATIONS = (aten.t.default, aten.transpose.int, aten.permute.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
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


@rule(aten._to_copy.default)
def conversion(call: Call) -> Result:
    """δ in the type of the result: that of y + δ would be rounded to y's digits first."""
    change, dtype = call.change(0), call.output.dtype
    if not call.args[0].is_floating_point() or not call.output.is_floating_point():
        return None
    if isinstance(change, OneHot):
        return OneHot(change.positions, change.steps.to(dtype))
    return Change(change.delta.to(dtype), change.block) if isinstance(change, Change) else None


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
    if change.block is None:
        return Change(change.delta.reshape(call.count, *new))
    found = _reshaped_block(old, new, change.block.dim)
    if found is None:
        split = _split_block(change, change.block, old, new)
        return split or Change(dense(change, old).reshape(call.count, *new))
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


def _split_block(change: Change, block: Block, old: torch.Size, new: torch.Size) -> Change | None:
    """A block whose axis is split, [length] → [outer, …], and that stays within one element of the outer axis."""
    dim, parts = block.dim, len(new) - len(old) + 1
    pieces = new[dim : dim + parts]
    if parts < 2 or new != (*old[:dim], *pieces, *old[dim + 1 :]) or prod(pieces) != old[dim]:
        return None
    inner = prod(pieces[1:])
    if any(start % inner + change.width > inner for start in block.start):
        return None
    whole = dense(
        Change(change.delta, Block(dim, tuple(start % inner for start in block.start))), _with(old, dim, inner)
    )
    start = tuple(start // inner for start in block.start)
    return Change(whole.reshape(change.count, *old[:dim], 1, *pieces[1:], *old[dim + 1 :]), Block(dim, start))


def _with(shape: torch.Size, dim: int, length: int) -> torch.Size:
    """The shape with another length along one axis."""
    return torch.Size([*shape[:dim], length, *shape[dim + 1 :]])


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
        return _part_of_block(call, change, block)
    removed = call.output.ndim < rank and axis < block.dim
    moved = call.target(delta, 1 + axis, *call.args[2:], **call.kwargs)
    return Change(moved, replace(block, dim=block.dim - removed))


def _part_of_block(call: Call, change: Change, block: Block) -> Change | None:
    """A select or a contiguous slice along the block's own axis."""
    length = call.args[0].shape[block.dim]
    if call.target is aten.select.int:
        cut = _cut(change, block, call.args[2] % length, 1)
        return cut and Change(cut.delta.squeeze(1 + block.dim))
    if call.target is not aten.slice.Tensor or call.argument(4, 1) != 1:
        return None
    first, last, _ = slice(call.argument(2), call.argument(3)).indices(length)
    return _cut(change, block, first, max(last - first, 0))


def _cut(change: Change, block: Block, first: int, length: int) -> Change | None:
    """What of a block lies within [first, first + length) of its axis; None where it lies across an end."""
    if all(first <= start and start + change.width <= first + length for start in block.start):
        return Change(change.delta, Block(block.dim, tuple(start - first for start in block.start)))
    return None


@rule(aten.expand.default)
def expand(call: Call) -> Result:
    """A block along an axis that keeps its length stays one; an element of a one-hot change is one along the last."""
    change, base = call.change(0), call.args[0]
    if isinstance(change, OneHot) and call.output.numel() == base.numel():
        return change
    if not isinstance(change, (OneHot, Change)):
        return _everywhere(call, change) if change is not None else None
    added = call.output.ndim - base.ndim
    kept = [axis for axis in range(base.ndim) if base.shape[axis] == call.output.shape[axis + added]]
    if isinstance(change, OneHot):
        change = _last_axis_block(change, base.shape, kept)
    if change.block is None or change.block.dim not in kept:
        return _everywhere(call, change)
    dim = change.block.dim + added
    delta = change.delta.reshape(call.count, *[1] * added, *change.delta.shape[1:])
    return Change(delta.expand(-1, *_with(call.output.shape, dim, change.width)), Block(dim, change.block.start))


def _last_axis_block(change: OneHot, shape: torch.Size, kept: list[int]) -> Change:
    """A one-hot change as a block of width 1 along the last of the axes `kept` that is longer than 1: of a matrix that
    is repeated for a batched product, one column."""
    dim = next((axis for axis in reversed(kept) if shape[axis] > 1), None)
    if dim is None:
        return Change(dense(change, shape))
    coordinates = list(torch.unravel_index(change.positions, shape))
    start = tuple(coordinates[dim].tolist())
    coordinates[dim] = torch.zeros_like(coordinates[dim])
    delta = change.steps.new_zeros([len(start), *_with(shape, dim, 1)])
    delta[(torch.arange(len(start), device=delta.device), *coordinates)] = change.steps
    return Change(delta, Block(dim, start))


@rule(aten.repeat.default)
def repeat(call: Call) -> Result:
    """Δ = δ, repeated."""
    change = call.change(0)
    if not isinstance(change, (Change, OneHot)):
        return None
    delta = dense(change, call.args[0].shape)
    missing = len(call.args[1]) - call.args[0].ndim
    return Change(delta.reshape(call.count, *[1] * missing, *delta.shape[1:]).repeat(1, *call.args[1]))


@rule(aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def splits(call: Call) -> Result:
    """Every piece of the difference, None where a piece does not move."""
    change, base = call.change(0), call.args[0]
    if isinstance(change, OneHot):
        change = one_hot_block(change, base.shape)
    if not isinstance(change, Change):
        return None
    unbound = call.target is aten.unbind.int
    axis = call.argument(1 if unbound else 2, 0) % base.ndim
    lengths = [1 if unbound else part.shape[axis] for part in call.output]
    pieces = [_piece(change, base.shape, axis, sum(lengths[:i]), length) for i, length in enumerate(lengths)]
    return tuple(_squeezed(piece, axis) if piece and unbound else piece for piece in pieces)


def _piece(change: Change, shape: torch.Size, axis: int, first: int, length: int) -> Change | None:
    """The change of y[first : first + length] along an axis; None where it does not move."""
    block = change.block
    if block is None or block.dim != axis:
        return Change(change.delta.narrow(1 + axis, first, length), block)
    if all(start >= first + length or start + change.width <= first for start in block.start):
        return None
    cut = _cut(change, block, first, length)
    return cut or Change(dense(change, shape).narrow(1 + axis, first, length))


def _squeezed(change: Change, axis: int) -> Change:
    """The change without an axis of length 1."""
    block = change.block
    if block is not None:
        block = None if block.dim == axis else replace(block, dim=block.dim - (axis < block.dim))
    return Change(change.delta.squeeze(1 + axis), block)
