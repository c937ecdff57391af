"""Operators that treat every element alone: a block stays a block, and one element of the result's shape stays one.

    any f:       Δf = f(y₁ + δ₁, y₂ + δ₂, …) − f(y₁, y₂, …)      taken in the next wider type
    a ± s·b:     Δ = δa ± s·δb
    a·b:         Δ = δa·b + a·δb + δa·δb
    a/b:         Δ = (δa − a/b·δb)/(b + δb)
    −a:          Δ = −δa

The named forms do not cancel: their rounding is relative to δ, not to y. More of them: `smooth`, `powers`, `piecewise`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Block, Change, OneHot, dense, difference, one_hot_block, take
from deepzero_core.perturb.rules.general import widened
from deepzero_core.perturb.rules.registry import Call, Result, Rule, find, plain_change, rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Aligned:
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


def align(call: Call) -> Aligned | None:
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
    return Aligned(block, tuple(on_block(operand) for operand in call.args), deltas, (call.count, *shape))


def pointwise(call: Call) -> Result:
    """Δf = f(y + δ) − f(y) on the block, both in the next wider type: exact and slow."""
    if not isinstance(call.output, Tensor) or not call.output.is_floating_point():
        return None
    aligned = align(call)
    if aligned is None or any(isinstance(arg, (list, tuple)) for arg in call.args):
        return None
    operands = [widened(base) for base in aligned.bases]
    for position, delta in aligned.deltas.items():
        operands[position] = operands[position] + delta
    width = aligned.shape[1 + aligned.block.dim] if aligned.block else 0
    base = call.once("wide", lambda: call.target(*(widened(arg) for arg in call.args), **call.kwargs))
    delta = difference(call.target(*operands, **call.kwargs), take(base, aligned.block, width))
    return Change(delta.to(call.output.dtype).expand(aligned.shape), aligned.block)


def one_element(call: Call) -> Result:
    """A one-hot change of an operand that has the result's shape stays one-hot: f is evaluated at P places alone."""
    (position, *others) = call.changed()
    change, shape = call.change(position), call.output.shape
    if others or not isinstance(change, OneHot) or call.args[position].shape != shape:
        return None
    if not shape or not call.output.is_floating_point():
        return None
    place = torch.unravel_index(change.positions, shape)
    operands = [widened(arg.expand(shape)[place] if isinstance(arg, Tensor) else arg) for arg in call.args]
    before = call.target(*operands, **call.kwargs)
    operands[position] = operands[position] + change.steps
    after = call.target(*operands, **call.kwargs)
    return OneHot(change.positions, difference(after, before).to(call.output.dtype))


def rule_for(target: Any) -> Rule | None:
    """The operator's own rule; before it, where torch declares the operator pointwise, that of one element, and behind
    it that of any f."""
    own = find(target)
    if torch.Tag.pointwise not in getattr(target, "tags", ()) or target is aten.clone.default:
        return own
    rules = [one_element, own or pointwise]
    return lambda call: next((result for result in (rule(call) for rule in rules) if result is not None), None)


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def sum_of_two(call: Call) -> Result:
    """Δ(a ± s·b) = δa ± s·δb."""
    aligned = align(call)
    if aligned is None or not call.output.is_floating_point():
        return None
    scale = call.kwargs.get("alpha", 1)
    sign = -scale if call.target is aten.sub.Tensor else scale
    terms = [delta if position == 0 or sign == 1 else sign * delta for position, delta in aligned.deltas.items()]
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return Change(total.to(call.output.dtype).expand(aligned.shape), aligned.block)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def product_of_two(call: Call) -> Result:
    """Δ(a·b) = δa·b + a·δb + δa·δb."""
    aligned = align(call)
    if aligned is None or not call.output.is_floating_point():
        return None
    if len(aligned.deltas) == 1:
        ((position, delta),) = aligned.deltas.items()
        change = delta * aligned.bases[1 - position]
    else:
        (a, b), da, db = aligned.bases, aligned.deltas[0], aligned.deltas[1]
        change = da * b + (a + da) * db
    return Change(change.to(call.output.dtype).expand(aligned.shape), aligned.block)


@rule(aten.div.Tensor, aten.div.Scalar)
def quotient_of_two(call: Call) -> Result:
    """Δ(a/b) = (δa − a/b·δb)/(b + δb)."""
    aligned = align(call)
    if aligned is None or not call.output.is_floating_point():
        return None
    if 1 not in aligned.deltas:
        change = aligned.deltas[0] / aligned.bases[1]
    elif not call.finite():
        return pointwise(call)
    else:
        width = aligned.shape[1 + aligned.block.dim] if aligned.block else 0
        shrink = take(call.output, aligned.block, width) * aligned.deltas[1]
        change = (aligned.deltas.get(0, 0) - shrink) / (aligned.bases[1] + aligned.deltas[1])
    return Change(change.to(call.output.dtype).expand(aligned.shape), aligned.block)


@rule(aten.neg.default, aten.rsub.Scalar)
def negative(call: Call) -> Result:
    """Δ(b − s·a) = −s·δa."""
    change = plain_change(call)
    return Change(-call.argument(2, 1) * change.delta, change.block) if change else None
