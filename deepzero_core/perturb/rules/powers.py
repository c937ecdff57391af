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

from collections.abc import Callable
from typing import Any

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


Formula = Callable[[Call, Change, Tensor, Tensor], Tensor | None]


def _formula(*targets: Any) -> Callable[[Formula], Formula]:
    """Register a function of (call, change, y, z) as a rule; the difference of values where it gives None."""

    def register(formula: Formula) -> Formula:
        @rule(*targets)
        def answer(call: Call) -> Result:
            found = _operands(call)
            moved = None if found is None else formula(call, *found)
            return pointwise(call) if found is None or moved is None else Change(moved, found[0].block)

        return formula

    return register


@_formula(aten.exp.default, aten.expm1.default)
def exponential(call: Call, change: Change, base: Tensor, result: Tensor) -> Tensor | None:
    if not within(change.delta, LARGEST_EXPONENT):
        return None
    if call.target is aten.expm1.default:
        result = call.on_block(change, "exp", call.args[0].exp)
    return result * change.delta.expm1()


@_formula(aten.log.default, aten.log1p.default)
def logarithm(call: Call, change: Change, base: Tensor, result: Tensor) -> Tensor | None:
    growth = change.delta / (1 + base if call.target is aten.log1p.default else base)
    return growth.log1p_() if within(growth, 0.5) else None


@_formula(aten.sqrt.default)
def square_root(call: Call, change: Change, base: Tensor, result: Tensor) -> Tensor | None:
    if not call.once("positive", lambda: bool((call.output > 0).all())):
        return None
    return change.delta / ((base + change.delta).sqrt_() + result)


@_formula(aten.rsqrt.default)
def reciprocal_root(call: Call, change: Change, base: Tensor, result: Tensor) -> Tensor:
    moved = (base + change.delta).rsqrt_()
    return -change.delta * result.square() * moved / (1 + result / moved)


@_formula(aten.reciprocal.default)
def reciprocal(call: Call, change: Change, base: Tensor, result: Tensor) -> Tensor:
    return -change.delta * result / (base + change.delta)


@_formula(aten.pow.Tensor_Scalar)
def power(call: Call, change: Change, base: Tensor, result: Tensor) -> Tensor | None:
    exponent, delta = call.args[1], change.delta
    if exponent in (2, 3, 4):
        moved = base + delta
        if exponent == 2:
            return (base + moved) * delta
        if exponent == 3:
            return delta * (base.square() + moved * (base + moved))
        return (base + moved) * delta * (base.square() + moved.square())
    growth = delta / base
    return result * (exponent * growth.log1p_()).expm1_() if within(growth, 0.5) else None
