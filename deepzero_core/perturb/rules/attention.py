"""Attention, softmax(s·a·b)·v with p = softmax(s·a·b) of every head.

    D = s·(δa·b + (a + δa)·δb),   S = Σ p·expm1(D),   Δp = p·(expm1(D) − S)/(1 + S)
    Δ = Δp·v + (p + Δp)·δv

The kernel does this head by head. Where it cannot, and for scores that move by more than 1, the rules of the product
and of the softmax do it one after the other.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Block, Change, OneHot, dense
from deepzero_core.perturb.native.attention import attention_change, suits
from deepzero_core.perturb.native.dense import in_vectors
from deepzero_core.perturb.rewriting.attention import attend, shares
from deepzero_core.perturb.rules.linear import matrix_product
from deepzero_core.perturb.rules.registry import Call, Result, rule
from deepzero_core.perturb.rules.softmax import softmax

aten = torch.ops.aten


@rule(attend)
def attention(call: Call) -> Result:
    a, b, v, scale = call.args
    if any(not isinstance(call.change(position), (Change, OneHot)) for position in call.changed()):
        return None
    if suits(call.output):
        probabilities = call.once("in vectors", lambda: in_vectors(shares(a, b, scale)))
        deltas = [None if change is None else dense(change, base.shape) for change, base in _operands(call)]
        found = attention_change((a, b, v), (deltas[0], deltas[1], deltas[2]), probabilities, scale, call.count)
        if found is not None:
            return Change(found)
    return _step_by_step(call, call.once("shares", lambda: shares(a, b, scale)))


def _operands(call: Call) -> list[tuple[Change | OneHot | None, Tensor]]:
    return list(zip(call.changes[:3], call.args[:3], strict=True))


def _step_by_step(call: Call, probabilities: Tensor) -> Result:
    scale = call.args[3]
    (a, da), (b, db), (v, dv) = (_heads(base, change) for change, base in _operands(call))
    scores = call.once("scores", lambda: torch.bmm(scale * a, b))
    moved = da if da is None else replace(da, delta=scale * da.delta)
    share, change = probabilities.flatten(0, 1), None
    if moved is not None or db is not None:
        step = replace(call, target=aten.bmm.default, args=(scale * a, b), changes=(moved, db), output=scores, kept={})
        product = matrix_product(step)
        kept: dict[str, Any] = call.once("kept", dict)
        share_call = replace(step, target=aten._softmax.default, args=(scores, -1, False), output=share, kept=kept)
        change = softmax(replace(share_call, changes=(product, None, None)))
    mixed = matrix_product(replace(call, target=aten.bmm.default, args=(share, v), changes=(change, dv), kept={}))
    if not isinstance(mixed, Change):
        return None
    whole = dense(mixed, torch.Size([*share.shape[:2], v.shape[2]]))
    return Change(whole.unflatten(1, call.output.shape[:2]))


def _heads(base: Tensor, change: Change | OneHot | None) -> tuple[Tensor, Change | None]:
    """A factor and its change with all heads of all examples along one axis: [B·H, ·, ·]."""
    flat = base.flatten(0, 1)
    if change is None:
        return flat, None
    if isinstance(change, Change) and change.block is not None and change.block.dim > 1:
        return flat, Change(change.delta.flatten(1, 2), Block(change.block.dim - 1, change.block.start))
    return flat, Change(dense(change, base.shape).flatten(1, 2))
