"""Activations whose difference can be taken without cancelling.

    ReLU:        Δ = max(δ + min(y, 0), −max(y, 0))
    LeakyReLU:   Δ = r + s·(δ − r),   r the ReLU's difference, s the negative slope

Where y and y + δ are both positive the first is δ itself, where both are negative it is 0. Every other activation is
pointwise (see `elementwise`).
"""

import torch

from deepzero_core.perturb.chain import base_layout, rectified
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule

aten = torch.ops.aten


@rule(aten.relu.default, aten.leaky_relu.default)
def relu(call: Call) -> Result:
    change = only_change(call)
    if change is None:
        return None
    slope = float(call.argument(1, 0.01)) if call.target is aten.leaky_relu.default else 0.0
    base = call.once("base", lambda: base_layout(call.args[0]))
    return rectified(change, base, slope)
