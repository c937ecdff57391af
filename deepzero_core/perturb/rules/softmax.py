"""Softmax and its logarithm along one axis, p = softmax(y), S = Σ p·expm1(δ).

log-softmax:  Δ = δ − log1p(S)
softmax:      Δ = p·(expm1(δ) − S)/(1 + S)

1 + S cancels and expm1 overflows where δ is large; there the difference of the values does not cancel, and is taken.
"""

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Change, dense, difference
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule

aten = torch.ops.aten


def _axis(call: Call) -> int:
    """The softmax axis of a delta [P, *s]."""
    return 1 + int(call.argument(1)) % max(int(call.output.ndim), 1)


@rule(aten._log_softmax.default)
def log_softmax(call: Call) -> Result:
    change = only_change(call)
    if change is None or call.argument(2):
        return None
    delta = dense(change, call.output.shape)
    shift = (call.output.exp() * delta.expm1()).sum(_axis(call), keepdim=True)
    return Change(_where_small(call, delta, delta - shift.log1p()))


@rule(aten._softmax.default)
def softmax(call: Call) -> Result:
    change = only_change(call)
    if change is None or call.argument(2):
        return None
    delta = dense(change, call.output.shape)
    growth = delta.expm1()
    shift = (call.output * growth).sum(_axis(call), keepdim=True)
    return Change(_where_small(call, delta, call.output * (growth - shift) / (1 + shift)))


def _where_small(call: Call, delta: Tensor, exact: Tensor) -> Tensor:
    """`exact` in the rows with every |δ| ≤ 1, f(y + δ) − f(y) in the others."""
    large = delta.abs().amax(_axis(call), keepdim=True) > 1 if delta.numel() else delta.new_zeros([], dtype=torch.bool)
    if not large.any():
        return exact
    return torch.where(large, difference(call.target(call.args[0] + delta, _axis(call), False), call.output), exact)
