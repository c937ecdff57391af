"""How a tensor of the network changes when parameters are perturbed.

A chunk evaluates P perturbations together. For a tensor with base value y of shape [*s] (the unperturbed pass):

    OneHot    one element of y moves:       positions [P] (flat, into y), steps [P]
    Change    delta [P, *s]                 all of y moves: the perturbed value is y + delta[p]
              delta [P, *s with w at dim]   only y[..., start[p] : start[p] + w, ...] along `dim` moves (a *block*)
    Replaced  value [P, *s]                 a tensor without differences: masks, arg-max indices
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OneHot:
    """One element per perturbation: y.flatten()[positions[p]] += steps[p]. A step of 0 changes nothing."""

    positions: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Block:
    """Where the change sits: along `dim`, from start[p]. `start` is kept in Python: it decides shapes, not values."""

    dim: int
    start: tuple[int, ...]

    @property
    def uniform(self) -> bool:
        return len(set(self.start)) <= 1


@dataclass(frozen=True)
class Change:
    """A difference to the base value; `block` None: every element may differ."""

    delta: Tensor
    block: Block | None = None

    @property
    def count(self) -> int:
        return self.delta.shape[0]

    @property
    def width(self) -> int:
        """Elements of the block along its axis."""
        assert self.block is not None
        return self.delta.shape[1 + self.block.dim]


@dataclass(frozen=True)
class Replaced:
    """The perturbed values themselves."""

    value: Tensor


AnyChange = OneHot | Change | Replaced


def take(base: Tensor, block: Block | None, width: int) -> Tensor:
    """The part of `base` [*s] that a block covers, broadcastable against its delta: [1 or P, *s with `width` at dim].

    A view when all perturbations share the block, otherwise one gather.
    """
    if block is None:
        return base.unsqueeze(0)
    if block.uniform:
        return base.narrow(block.dim, block.start[0] if block.start else 0, width).unsqueeze(0)
    start = torch.tensor(block.start, device=base.device)
    rows = start[:, None] + torch.arange(width, device=base.device)
    picked = base.movedim(block.dim, 0)[rows]
    return picked.movedim(1, 1 + block.dim)


def one_hot_block(change: OneHot, shape: torch.Size) -> Change:
    """A one-hot change as a block of width 1 along the longest axis: [P, *shape with 1 there]."""
    if not shape:
        return Change(change.steps)
    dim = max(range(len(shape)), key=lambda axis: shape[axis])
    coordinates = list(torch.unravel_index(change.positions, shape))
    start = tuple(coordinates[dim].tolist())
    coordinates[dim] = torch.zeros_like(coordinates[dim])
    count = change.positions.numel()
    delta = change.steps.new_zeros([count, *shape[:dim], 1, *shape[dim + 1 :]])
    delta[(torch.arange(count, device=delta.device), *coordinates)] = change.steps
    return Change(delta, Block(dim, start))


def dense(change: OneHot | Change, shape: torch.Size) -> Tensor:
    """The change as a full difference [P, *shape], zero where nothing moves."""
    if isinstance(change, OneHot):
        count = change.positions.numel()
        full = change.steps.new_zeros([count, shape.numel()])
        full[torch.arange(count, device=full.device), change.positions] = change.steps
        return full.view(count, *shape)
    if change.block is None:
        return change.delta
    dim, width = change.block.dim, change.width
    full = _zeros(change.delta, shape)
    if change.block.uniform:
        full.narrow(1 + dim, change.block.start[0] if change.block.start else 0, width).copy_(change.delta)
        return full
    start = torch.tensor(change.block.start, device=full.device)
    rows = start[:, None] + torch.arange(width, device=full.device)
    view = [change.count] + [1] * len(shape)
    view[1 + dim] = width
    return full.scatter_(1 + dim, rows.view(view).expand_as(change.delta), change.delta)


def _zeros(like: Tensor, shape: torch.Size) -> Tensor:
    """Zeros [P, *shape], the first axis behind P innermost in memory where it is in `like`."""
    if like.ndim > 2 and like.stride(1) == 1 and like.shape[1] > 1:
        return like.new_zeros([like.shape[0], *shape[1:], shape[0]]).movedim(-1, 1)
    return like.new_zeros([like.shape[0], *shape])


def difference(value: Tensor, base: Tensor) -> Tensor:
    """value − base in the base's type, and 0 where an infinity stays (the −∞ of a masked score)."""
    delta = value - base
    if not base.isfinite().all():
        delta = torch.where(value == base, 0, delta)
    return delta.to(base.dtype)


def perturbed(base: Tensor, change: AnyChange) -> Tensor:
    """The perturbed values [P, *s]."""
    if isinstance(change, Replaced):
        return change.value
    return base.unsqueeze(0) + dense(change, base.shape)
