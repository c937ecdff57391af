"""Two linear layers and a smooth function f between them, f(x·W + c)·W₂ + c₂ with y = x·W + c.

    x moves by δ:    h = δ·W,   Δ = [f(y + h) − f(y)]·W₂       f's difference as a polynomial in h: see `smooth`

The kernel takes a few rows at a time. Where it cannot, and where a parameter or a block moves, the rules of the
three operators answer one after the other.
"""

from functools import partial

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Change
from deepzero_core.perturb.native import dense as native
from deepzero_core.perturb.rewriting.feed_forward import feed_forward
from deepzero_core.perturb.rules.parts import change_of_part
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule
from deepzero_core.perturb.rules.smooth import TERMS, coefficients

aten = torch.ops.aten

_SAMPLED = 16
"""One row of so many is multiplied first, to see how large h is."""


@rule(feed_forward)
def feed_forward_difference(call: Call) -> Result:
    bias, weight, inputs, *_ = call.args
    hidden = call.once("hidden", lambda: torch.addmm(bias, inputs, weight))
    change = only_change(call, 2)
    if change is not None and change.block is None and native.suits(change.delta, hidden):
        found = _by_rows(call, change.delta, hidden)
        if found is not None:
            return Change(found)
    return _one_after_the_other(call, hidden)


def _by_rows(call: Call, delta: Tensor, hidden: Tensor) -> Tensor | None:
    _, weight, _, _, weight_2, function, arguments, keywords = call.args
    first = call.once("first", lambda: native.in_vectors(weight))
    second = call.once("second", lambda: native.in_vectors(weight_2))
    least = float((delta.flatten(0, 1)[::_SAMPLED] @ weight).abs().max())
    for radius in (radius for radius in TERMS if least <= radius):
        expand = partial(coefficients, lambda y: function(y, *arguments, **keywords), hidden, radius)
        known = call.once(f"within {radius}", expand)
        found = native.feed_forward(delta, first, second, weight_2.shape[1], known, radius)
        if found is not None:
            return found
    return None


def _one_after_the_other(call: Call, hidden: Tensor) -> Result:
    bias, weight, inputs, bias_2, weight_2, function, arguments, keywords = call.args
    c, w, x, c_2, w_2, *_ = call.changes
    activated = call.once("activated", lambda: function(hidden, *arguments, **keywords))
    h = change_of_part(call, "first", aten.addmm.default, (bias, inputs, weight), {}, (c, x, w), hidden)
    a = change_of_part(call, "f", function, (hidden, *arguments), keywords, (h, *[None] * len(arguments)), activated)
    operands, moved = (bias_2, activated, weight_2), (c_2, a, w_2)
    found: Result = change_of_part(call, "second", aten.addmm.default, operands, {}, moved, call.output)
    return found
