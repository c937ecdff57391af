"""Smooth functions of one variable: a polynomial in δ whose coefficients depend on y alone.

    f(y + δ) − f(y) = δ·g(δ),   g(x) = [f(y + x) − f(y)]/x ≈ c₀(y) + c₁(y)·x + … + cₙ₋₁(y)·xⁿ⁻¹   for |x| ≤ r

The cⱼ(y) belong to the polynomial through g at the n Chebyshev nodes r·cos(π(2k + 1)/2n), taken in float64 once per
base pass. A change then costs n products and sums, no transcendental function, and rounds relative to δ. Analytic up to
3/2 from the real line, as all functions here are, g is met to 6e-7. Where some |δ| exceeds every r, and in types
other than float32, the difference of values is taken in the wider type.
"""

from collections.abc import Callable
from dataclasses import replace
from math import cos, pi

import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.perturb.changes import Change, take
from deepzero_core.perturb.native import dense as native
from deepzero_core.perturb.rules.elementwise import pointwise
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule, within

aten = torch.ops.aten

TERMS = {1 / 1024: 2, 1 / 16: 4, 1 / 4: 6, 1: 12}
"""How many coefficients hold to which radius r."""


@rule(
    aten.gelu.default,
    aten.silu.default,
    aten.mish.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.erf.default,
    aten.sin.default,
    aten.cos.default,
)
def smooth(call: Call) -> Result:
    change = _expand(call, lambda y: call.target(y, *call.args[1:], **call.kwargs))
    return change or pointwise(call)


@rule(aten.softplus.default)
def softplus(call: Call) -> Result:
    """log(1 + exp βy)/β, and y itself where βy exceeds the threshold: smooth where that is high."""
    beta, threshold = call.argument(1, 1), call.argument(2, 20)
    if 0 < beta <= 2 and threshold >= 20:
        return _expand(call, lambda y: F.softplus(y, beta, 40)) or pointwise(call)
    return pointwise(call)


@rule(aten.log_sigmoid_forward.default)
def log_sigmoid(call: Call) -> Result:
    """Of two results the second is read by no one but the backward pass."""
    change = _expand(call, F.logsigmoid) or pointwise(replace(call, target=F.logsigmoid, output=call.output[0]))
    return (change, None) if isinstance(change, Change) else None


def _expand(call: Call, function: Callable[[Tensor], Tensor]) -> Change | None:
    """δ·g(δ) with as few coefficients as the largest |δ| allows; None where none are enough."""
    change = only_change(call)
    if change is None or call.args[0].dtype != torch.float32:
        return None
    delta, width = change.delta, change.width if change.block else 0
    radius = next((radius for radius in TERMS if within(delta, radius)), None)
    if radius is None:
        return None
    found = call.once(f"within {radius}", lambda: coefficients(function, call.args[0], radius))
    if change.block is None and native.suits(delta, *found):
        return Change(native.polynomial(delta, found))
    *lower, below, highest = (take(coefficient, change.block, width) for coefficient in found)
    total = torch.addcmul(below, highest, delta)
    for coefficient in reversed(lower):
        total = torch.addcmul(coefficient, total, delta)
    return Change(total.mul_(delta), change.block)


def coefficients(function: Callable[[Tensor], Tensor], base: Tensor, radius: float) -> tuple[Tensor, ...]:
    """c₀ … cₙ₋₁, each of the base's shape and type; 0 where y is infinite."""
    terms = TERMS[radius]
    wide = base.double()
    nodes = [cos(pi * (2 * k + 1) / (2 * terms)) for k in range(terms)]
    middle = function(wide)
    values = torch.stack([(function(wide + radius * node) - middle) / (radius * node) for node in nodes])
    powers = torch.linalg.vander(torch.tensor(nodes, dtype=torch.float64))
    weights = powers.inverse() / radius ** torch.arange(terms, dtype=torch.float64)[:, None]
    found = torch.tensordot(weights.to(base.device), values, 1).nan_to_num_(0.0)
    return tuple(coefficient.to(base.dtype) for coefficient in found)
