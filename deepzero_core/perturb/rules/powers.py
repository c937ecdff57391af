"""Exponentials, logarithms, roots and powers, z = f(y) the base result.

    eʸ:        Δ = z·expm1 δ                              eʸ − 1:      Δ = eʸ·expm1 δ
    log y:     Δ = log1p(δ/y)                             log(1 + y):  Δ = log1p(δ/(1 + y))
    √y:        Δ = δ/(√(y + δ) + z)                       y^−½:        Δ = −δ·z²·z'/(1 + z/z'),   z' = (y + δ)^−½
    1/y:       Δ = −δ·z/(y + δ)
    yⁿ:        Δ = δ·Σ yᵏ·(y + δ)ⁿ⁻¹⁻ᵏ                    k = 0 … n − 1, for n = 2, 3, 4
    yᵃ:        Δ = z·expm1(a·log1p(δ/y))

At infinities, at zeros of the root, for large steps of an exponential and for |δ| beyond half the argument of a
logarithm or of a real power the difference of values is taken.
"""

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Change, take
from deepzero_core.perturb.rules.elementwise import pointwise
from deepzero_core.perturb.rules.registry import LARGEST_EXPONENT, Call, Result, plain_change, rule, within

aten = torch.ops.aten


def _operands(call: Call) -> tuple[Change, Tensor, Tensor] | None:
    """The change, and y and z where it sits; None where the formulas do not hold."""
    change = plain_change(call)
    if change is None or not call.output.is_floating_point() or call.args[0].dtype != call.output.dtype:
        return None
    if not call.finite():
        return None
    width = change.width if change.block else 0
    return change, take(call.args[0], change.block, width), take(call.output, change.block, width)


@rule(aten.exp.default, aten.expm1.default)
def exponential(call: Call) -> Result:
    found = _operands(call)
    if found is None or not within(found[0].delta, LARGEST_EXPONENT):
        return pointwise(call)
    change, _, result = found
    if call.target is aten.expm1.default:
        result = call.on_block(change, "exp", call.args[0].exp)
    return Change(result * change.delta.expm1(), change.block)


@rule(aten.log.default, aten.log1p.default)
def logarithm(call: Call) -> Result:
    found = _operands(call)
    if found is None:
        return pointwise(call)
    change, base, _ = found
    growth = change.delta / (1 + base if call.target is aten.log1p.default else base)
    return Change(growth.log1p_(), change.block) if within(growth, 0.5) else pointwise(call)


@rule(aten.sqrt.default)
def square_root(call: Call) -> Result:
    found = _operands(call)
    if found is None or not call.once("positive", lambda: bool((call.output > 0).all())):
        return pointwise(call)
    change, base, result = found
    return Change(change.delta / ((base + change.delta).sqrt_() + result), change.block)


@rule(aten.rsqrt.default)
def reciprocal_root(call: Call) -> Result:
    found = _operands(call)
    if found is None:
        return pointwise(call)
    change, base, result = found
    moved = (base + change.delta).rsqrt_()
    return Change(-change.delta * result.square() * moved / (1 + result / moved), change.block)


@rule(aten.reciprocal.default)
def reciprocal(call: Call) -> Result:
    found = _operands(call)
    if found is None:
        return pointwise(call)
    change, base, result = found
    return Change(-change.delta * result / (base + change.delta), change.block)


@rule(aten.pow.Tensor_Scalar)
def power(call: Call) -> Result:
    found = _operands(call)
    if found is None:
        return pointwise(call)
    change, base, result = found
    exponent, delta = call.args[1], change.delta
    if exponent in (2, 3, 4):
        moved = base + delta
        total = (base + moved) * delta if exponent == 2 else delta * (base.square() + moved * (base + moved))
        if exponent == 4:
            total = (base + moved) * delta * (base.square() + moved.square())
        return Change(total, change.block)
    growth = delta / base
    if not within(growth, 0.5):
        return pointwise(call)
    return Change(result * (exponent * growth.log1p_()).expm1_(), change.block)
