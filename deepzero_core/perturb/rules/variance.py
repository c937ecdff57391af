"""Spread along axes: variance, standard deviation, Euclidean norm. n values, x̂ = y − mean y, c the correction.

    variance v:   Δv = (Σ(2x̂ + δ)·δ − (Σδ)²/n)/(n − c)         mean:  Δm = Σδ/n
    √v:           Δ = Δv/(√(v + Δv) + √v)
    ‖y‖:          Δ = Q/(√(‖y‖² + Q) + ‖y‖),   Q = Σ(2y + δ)·δ

A block that is summed over takes its own values alone, one along another axis stays a block.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Change, take
from deepzero_core.perturb.rules.reduction import summed_over
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule

aten = torch.ops.aten


@rule(aten.var.correction, aten.std.correction, aten.var_mean.correction)
def variance(call: Call) -> Result:
    change, axes = only_change(call), _axes(call, 1)
    keep, correction = call.kwargs.get("keepdim", False), call.kwargs.get("correction")
    size = prod(call.args[0].shape[axis] for axis in axes)
    freedom = size - (1 if correction is None else correction)
    if change is None or not call.args[0].ndim or freedom <= 0:
        return None
    total = _sum(change.delta, axes)
    centred = call.on_block(change, "centred", lambda: call.args[0] - call.args[0].mean(axes, keepdim=True))
    moved = (_sum(torch.add(change.delta, centred, alpha=2) * change.delta, axes) - total.square() / size) / freedom
    if call.target is aten.var_mean.correction:
        return _behind(axes, keep, moved, change), _behind(axes, keep, total / size, change)
    if call.target is aten.std.correction:
        root = call.once("root", lambda: call.args[0].std(axes, correction=correction, keepdim=True))
        return _rooted(axes, keep, moved, root, change)
    return _behind(axes, keep, moved, change)


@rule(aten.linalg_vector_norm.default)
def norm(call: Call) -> Result:
    change, axes = only_change(call), _axes(call, 2)
    if change is None or not call.args[0].ndim or call.argument(1, 2) != 2 or call.kwargs.get("dtype") is not None:
        return None
    base = call.on_block(change, "base", lambda: call.args[0])
    moved = _sum(torch.add(change.delta, base, alpha=2) * change.delta, axes)
    root = call.once("root", lambda: torch.linalg.vector_norm(call.args[0], dim=axes, keepdim=True))
    return _rooted(axes, bool(call.argument(3, False)), moved, root, change)


def _axes(call: Call, position: int) -> list[int]:
    rank = call.args[0].ndim
    given: Any = call.argument(position)
    given = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    return [axis % max(rank, 1) for axis in given]


def _sum(values: Tensor, axes: list[int]) -> Tensor:
    return values.sum([1 + axis for axis in axes], keepdim=True)


def _behind(axes: list[int], keep: bool, delta: Tensor, change: Change) -> Change:
    block = None if change.block and change.block.dim in axes else change.block
    return summed_over(axes, keep, delta, block)


def _rooted(axes: list[int], keep: bool, moved: Tensor, root: Tensor, change: Change) -> Change:
    """Δ√q from Δq; where √q is 0 the value itself."""
    block = None if change.block and change.block.dim in axes else change.block
    before = take(root, block, change.width if block else 0)
    after = (before.square() + moved).clamp_(min=0).sqrt_()
    delta = torch.where(before > 0, moved / (after + before), after)
    return _behind(axes, keep, delta, change)
