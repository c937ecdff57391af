"""Activations whose difference can be taken without cancelling.

    ReLU:        Δ = max(δ + min(y, 0), −max(y, 0))
    LeakyReLU:   Δ = r + s·(δ − r),   r the ReLU's difference, s the negative slope

Where y and y + δ are both positive the first is δ itself, where both are negative it is 0. Every other activation is
pointwise (see `elementwise`).
"""

import torch

from deepzero_core.perturb.changes import Change
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule

aten = torch.ops.aten


@rule(aten.relu.default, aten.leaky_relu.default)
def relu(call: Call) -> Result:
    change = only_change(call)
    if change is None:
        return None
    negative = call.on_block(change, "negative", lambda: call.args[0].clamp(max=0))
    positive = call.on_block(change, "positive", lambda: call.args[0].clamp(min=0))
    rectified = torch.maximum(change.delta + negative, -positive)
    if call.target is aten.relu.default:
        return Change(rectified, change.block)
    slope = float(call.argument(1, 0.01))
    return Change(rectified + slope * (change.delta - rectified), change.block)
