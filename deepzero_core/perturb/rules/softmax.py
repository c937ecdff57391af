"""Softmax and its logarithm along one axis, p = softmax(y), S = Σ p·expm1(δ).

log-softmax:  Δ = δ − log1p(S)
softmax:      Δ = p·(expm1(δ) − S)/(1 + S)
"""

import torch

from deepzero_core.perturb.changes import Change, dense
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
    return Change(delta - shift.log1p())


@rule(aten._softmax.default)
def softmax(call: Call) -> Result:
    change = only_change(call)
    if change is None or call.argument(2):
        return None
    growth = dense(change, call.output.shape).expm1()
    shift = (call.output * growth).sum(_axis(call), keepdim=True)
    return Change(call.output * (growth - shift) / (1 + shift))
