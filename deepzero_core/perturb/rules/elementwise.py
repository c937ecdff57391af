"""Operators that treat every element alone: a block stays a block.

    any f:       Δf = f(y₁ + δ₁, y₂ + δ₂, …) − f(y₁, y₂, …)
    a ± s·b:     Δ = δa ± s·δb
    a·b:         Δ = δa·b + a·δb + δa·δb
    a/b:         Δ = δa/b                      (b unchanged)
    −a:          Δ = −δa
    a²:          Δ = (2a + δa)·δa

The named forms do not cancel: their rounding is relative to δ, not to y.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Block, Change, OneHot, dense, difference, one_hot_block, take
from deepzero_core.perturb.rules.registry import Call, Result, Rule, find, only_change, rule

aten = torch.ops.aten


@dataclass(frozen=True)
class _Aligned:
    """Operands and their differences on a common block, padded to the rank of the result: [P or 1, …]."""

    block: Block | None
    bases: tuple[Any, ...]
    deltas: dict[int, Tensor]
    shape: tuple[int, ...]
    """Of the result's block: [P, *s with the width at the block's axis]."""


def _pad(value: Tensor, rank: int) -> Tensor:
    """[P, *s] → [P, 1, …, 1, *s] with `rank` axes behind the first."""
    missing = rank - (value.ndim - 1)
    return value.reshape(value.shape[0], *[1] * missing, *value.shape[1:]) if missing else value


def _common_block(changes: dict[int, Change], call: Call) -> Block | None:
    """The block that all changed operands share, in axes of the result; None where they do not."""
    output: Tensor = call.output
    found: set[tuple[int, tuple[int, ...], int]] = set()
    for position, change in changes.items():
        operand: Tensor = call.args[position]
        if change.block is None:
            return None
        dim = change.block.dim + output.ndim - operand.ndim
        if operand.shape[change.block.dim] != output.shape[dim]:
            return None
        found.add((dim, change.block.start, change.width))
    if len(found) != 1:
        return None
    dim, start, _ = found.pop()
    return Block(dim, start)


def _align(call: Call) -> _Aligned | None:
    output = call.output
    changes: dict[int, Change] = {}
    for position in call.changed():
        change = call.change(position)
        if isinstance(change, OneHot):
            change = one_hot_block(change, call.args[position].shape)
        if not isinstance(change, Change):
            return None
        changes[position] = change
    block = _common_block(changes, call)
    width = next(iter(changes.values())).width if block else 0

    def on_block(operand: Any) -> Any:
        if not isinstance(operand, Tensor) or operand.ndim == 0:
            return operand
        dim = block.dim - (output.ndim - operand.ndim) if block else -1
        covers = block is not None and dim >= 0 and operand.shape[dim] != 1
        return _pad(take(operand, replace(block, dim=dim) if block and covers else None, width), output.ndim)

    deltas = {
        position: _pad(change.delta if block else dense(change, call.args[position].shape), output.ndim)
        for position, change in changes.items()
    }
    shape = list(output.shape)
    if block:
        shape[block.dim] = width
    return _Aligned(block, tuple(on_block(operand) for operand in call.args), deltas, (call.count, *shape))


def _pointwise(call: Call) -> Result:
    """Δf = f(y + δ) − f(y) on the block."""
    if not isinstance(call.output, Tensor) or not call.output.is_floating_point():
        return None
    aligned = _align(call)
    if aligned is None or any(isinstance(arg, (list, tuple)) for arg in call.args):
        return None
    operands = [base + aligned.deltas[i] if i in aligned.deltas else base for i, base in enumerate(aligned.bases)]
    width = aligned.shape[1 + aligned.block.dim] if aligned.block else 0
    base = take(call.output, aligned.block, width)
    return Change(difference(call.target(*operands, **call.kwargs), base).expand(aligned.shape), aligned.block)


def rule_for(target: Any) -> Rule | None:
    """The operator's own rule, or the pointwise one where torch declares the operator pointwise."""
    own = find(target)
    if own is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return _pointwise
    return own


@rule(aten.add.Tensor, aten.sub.Tensor)
def sum_of_two(call: Call) -> Result:
    """Δ(a ± s·b) = δa ± s·δb."""
    aligned = _align(call)
    if aligned is None or not call.output.is_floating_point():
        return None
    scale = call.kwargs.get("alpha", 1)
    sign = -scale if call.target is aten.sub.Tensor else scale
    terms = [delta if position == 0 or sign == 1 else sign * delta for position, delta in aligned.deltas.items()]
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return Change(total.to(call.output.dtype).expand(aligned.shape), aligned.block)


@rule(aten.mul.Tensor)
def product_of_two(call: Call) -> Result:
    """Δ(a·b) = δa·b + a·δb + δa·δb."""
    aligned = _align(call)
    if aligned is None or not call.output.is_floating_point():
        return None
    if len(aligned.deltas) == 1:
        ((position, delta),) = aligned.deltas.items()
        change = delta * aligned.bases[1 - position]
    else:
        (a, b), da, db = aligned.bases, aligned.deltas[0], aligned.deltas[1]
        change = da * b + (a + da) * db
    return Change(change.to(call.output.dtype).expand(aligned.shape), aligned.block)


@rule(aten.div.Tensor)
def quotient_of_two(call: Call) -> Result:
    """Δ(a/b) = δa/b where b stays; otherwise pointwise."""
    if call.changed() != (0,):
        return _pointwise(call)
    aligned = _align(call)
    if aligned is None or not call.output.is_floating_point():
        return None
    quotient = (aligned.deltas[0] / aligned.bases[1]).to(call.output.dtype)
    return Change(quotient.expand(aligned.shape), aligned.block)


@rule(aten.neg.default)
def negative(call: Call) -> Result:
    """Δ(−a) = −δa."""
    change = only_change(call)
    return Change(-change.delta, change.block) if change else None


@rule(aten.pow.Tensor_Scalar)
def power(call: Call) -> Result:
    """Δ(a²) = (2a + δa)·δa; other exponents are pointwise."""
    change = only_change(call)
    if change is None or call.args[1] != 2 or not call.output.is_floating_point():
        return _pointwise(call)
    base = take(call.args[0], change.block, change.width if change.block else 0)
    return Change(torch.add(change.delta, base, alpha=2) * change.delta, change.block)


@rule(aten.mse_loss.default)
def squared_error(call: Call) -> Result:
    """Δ(y − t)² = (2(y − t) + δ)·δ, then its mean or sum; t unchanged."""
    change = only_change(call)
    if change is None or call.args[0].shape != call.args[1].shape:
        return None
    delta = dense(change, call.args[0].shape)
    error = call.once("error", lambda: call.args[0] - call.args[1])
    squared = torch.add(delta, error, alpha=2) * delta
    axes = list(range(1, squared.ndim))
    match call.argument(2, 1):
        case 0:
            return Change(squared)
        case 1:
            return Change(squared.mean(axes) if axes else squared)
        case _:
            return Change(squared.sum(axes) if axes else squared)
