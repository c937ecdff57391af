"""Functions of several pieces. A piece that stays contributes its own difference, and the jump between two pieces is
written so that it is exactly 0 where none is left.

    min/max of a and b, m the result:    Δ = max(δa + (a − m), δb + (b − m))           min likewise
    clamp to [l, h], c the result:       Δ = clamp(δ + (y − c), l − c, h − c)
    |y|:                                 Δ = max(δ + (y − |y|), −δ − (y + |y|))
    PReLU, weight w, r = max(y, 0):      Δ = Δr + w·(δ − Δr) + δw·min(y + δ, 0)
    ELU, scales s, α, ι:                 Δ = s·Δr + s·α·exp(ι·min(y, 0))·expm1(ι·(δ − Δr))
    hard sigmoid, c = clamp(y, −3, 3):   Δ = Δc/6
    hard swish, h its hard sigmoid:      Δ = δ·h + (y + δ)·Δc/6
    soft shrink, c = clamp(y, −λ, λ):    Δ = δ − Δc
    threshold t, v below, z the result:  Δ = δ + (y − z) where y + δ > t, else v − z
    where, masked fill:                  Δ = δ of the piece that is chosen
"""

import math
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Change, Replaced
from deepzero_core.perturb.rules.elementwise import align, pointwise
from deepzero_core.perturb.rules.registry import LARGEST_EXPONENT, Call, Result, plain_change, rule, within

aten = torch.ops.aten


def clamped(call: Call, change: Change, low: Any = None, high: Any = None) -> Tensor:
    """Δ of clamp(y, low, high), y the first operand; the bounds are numbers, tensors or None."""

    def result() -> Tensor:
        return call.once("clamped", lambda: torch.clamp(call.args[0], low, high))

    def to_bound(bound: Any, absent: float) -> Tensor:
        return (
            torch.full_like(result(), absent)
            if bound is None
            else (bound - result()).nan_to_num(0.0, math.inf, -math.inf)
        )

    excess = call.on_block(change, "excess", lambda: torch.where(call.args[0] == result(), 0, call.args[0] - result()))
    floor = call.on_block(change, "floor", lambda: to_bound(low, -math.inf))
    ceiling = call.on_block(change, "ceiling", lambda: to_bound(high, math.inf))
    return torch.clamp(change.delta + excess, floor, ceiling)


def _alone(call: Call) -> Change | None:
    """The change of the first operand when it has the result's shape and nothing else moves."""
    change = plain_change(call)
    whole = change is not None and call.args[0].shape == call.output.shape and call.output.is_floating_point()
    return change if whole and call.args[0].dtype == call.output.dtype else None


@rule(
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clamp_min.default,
    aten.clamp_min.Tensor,
    aten.clamp_max.default,
    aten.clamp_max.Tensor,
)
def clamp(call: Call) -> Result:
    change = _alone(call)
    if change is None:
        return pointwise(call)
    if call.target is aten.hardtanh.default:
        bounds = (call.argument(1, -1), call.argument(2, 1))
    elif call.target in (aten.clamp_max.default, aten.clamp_max.Tensor):
        bounds = (None, call.args[1])
    else:
        bounds = (call.argument(1), call.argument(2))
    return Change(clamped(call, change, *bounds), change.block)


@rule(aten.maximum.default, aten.minimum.default)
def extremum(call: Call) -> Result:
    aligned = align(call)
    if aligned is None or not call.output.is_floating_point() or not call.finite():
        return pointwise(call)
    a, b = aligned.bases
    best = call.target(a, b)
    da, db = (aligned.deltas.get(position, 0) + (base - best) for position, base in enumerate((a, b)))
    return Change(call.target(da, db).to(call.output.dtype).expand(aligned.shape), aligned.block)


@rule(aten.abs.default)
def absolute(call: Call) -> Result:
    change = _alone(call)
    if change is None or not call.finite():
        return pointwise(call)
    below = call.on_block(change, "below", lambda: call.args[0] - call.output)
    above = call.on_block(change, "above", lambda: call.args[0] + call.output)
    return Change(torch.maximum(change.delta + below, -change.delta - above), change.block)


@rule(aten._prelu_kernel.default)
def prelu(call: Call) -> Result:
    aligned = align(call)
    if aligned is None or not call.finite():
        return None
    base, weight = aligned.bases
    if 0 not in aligned.deltas:
        return Change((aligned.deltas[1] * base.clamp(max=0)).expand(aligned.shape), aligned.block)
    delta, negative = aligned.deltas[0], base.clamp(max=0)
    right = torch.maximum(delta + negative, negative - base)
    left = delta - right
    total = torch.addcmul(right, weight, left)
    if 1 in aligned.deltas:
        total = torch.addcmul(total, aligned.deltas[1], negative + left)
    return Change(total, aligned.block)


@rule(aten.elu.default, aten.celu.default)
def elu(call: Call) -> Result:
    change = _alone(call)
    if change is None:
        return pointwise(call)
    alpha, scale, input_scale = call.argument(1, 1), call.argument(2, 1), call.argument(3, 1)
    if call.target is aten.celu.default:
        input_scale = 1 / alpha
    if input_scale <= 0 or not within(change.delta, LARGEST_EXPONENT / input_scale):
        return pointwise(call)
    right = clamped(call, change, 0)
    left = change.delta - right
    slope = call.on_block(change, "slope", lambda: (input_scale * call.args[0].clamp(max=0)).exp_())
    return Change(scale * torch.addcmul(right, slope, (input_scale * left).expm1_(), value=alpha), change.block)


@rule(aten.hardsigmoid.default, aten.hardswish.default)
def hard_sigmoid(call: Call) -> Result:
    change = _alone(call)
    if change is None or not call.finite():
        return pointwise(call)
    moved = clamped(call, change, -3, 3) / 6
    if call.target is aten.hardswish.default:
        gate = call.on_block(change, "gate", lambda: torch.nn.functional.hardsigmoid(call.args[0]))
        base = call.on_block(change, "base", lambda: call.args[0])
        moved = torch.addcmul(change.delta * gate, base + change.delta, moved)
    return Change(moved, change.block)


@rule(aten.softshrink.default)
def soft_shrink(call: Call) -> Result:
    change, width = _alone(call), call.argument(1, 0.5)
    return Change(change.delta - clamped(call, change, -width, width), change.block) if change else pointwise(call)


@rule(aten.threshold.default)
def threshold(call: Call) -> Result:
    change = _alone(call)
    if change is None or not call.finite():
        return pointwise(call)
    base = call.on_block(change, "base", lambda: call.args[0])
    kept = call.on_block(change, "kept", lambda: call.args[0] - call.output)
    dropped = call.on_block(change, "dropped", lambda: call.args[2] - call.output)
    return Change(torch.where(base + change.delta > call.args[1], change.delta + kept, dropped), change.block)


@rule(aten.where.self)
def where(call: Call) -> Result:
    if isinstance(call.change(0), Replaced):
        return None
    aligned = align(call)
    if aligned is None or not call.output.is_floating_point():
        return None
    chosen, *_ = aligned.bases
    delta = torch.where(chosen, aligned.deltas.get(1, 0), aligned.deltas.get(2, 0))
    return Change(delta.to(call.output.dtype).expand(aligned.shape), aligned.block)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(call: Call) -> Result:
    aligned = align(call)
    if aligned is None or set(aligned.deltas) != {0}:
        return pointwise(call)
    return Change(aligned.deltas[0].masked_fill(aligned.bases[1], 0).expand(aligned.shape), aligned.block)
