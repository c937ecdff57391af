"""Activations whose difference can be taken without cancelling.

    ReLU:        Δ = max(δ + min(y, 0), −max(y, 0))
    LeakyReLU:   Δ = r + s·(δ − r),   r the ReLU's difference, s the negative slope

Where y and y + δ are both positive the first is δ itself, where both are negative it is 0. Every other activation is
pointwise (see `elementwise`).
"""

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Change, take
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule

aten = torch.ops.aten


def _relu(call: Call, change: Change) -> Tensor:
    width = change.width if change.block else 0
    negative = take(call.once("negative", lambda: call.args[0].clamp(max=0)), change.block, width)
    floor = take(call.once("floor", lambda: -call.args[0].clamp(min=0)), change.block, width)
    return torch.maximum(change.delta + negative, floor)


@rule(aten.relu.default)
def relu(call: Call) -> Result:
    change = only_change(call)
    return Change(_relu(call, change), change.block) if change else None


@rule(aten.leaky_relu.default)
def leaky_relu(call: Call) -> Result:
    change = only_change(call)
    if change is None:
        return None
    slope = call.argument(1, 0.01)
    positive = _relu(call, change)
    return Change(positive + slope * (change.delta - positive), change.block)
