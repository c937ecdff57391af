"""The last linear layer and the cross-entropy of its scores z = x·W + c; p = softmax(z), t the class, over B examples.

    Δl = mean over the batch of log1p(S) − δ_t,   S = Σ_k p_k·expm1(δ_k)          δ: the change of the scores

Closed forms take the number K of classes out of what a coordinate costs:

    c_k or W_ck moves by s:    one score moves, by a = s or s·x_c:       S = p_k·expm1(a),   δ_t = a where t is k
    x_c moves by a:            δ_k = a·W_ck: behind the last normalisation, or whatever moves one feature.
                               S = Σ_n aⁿ·M_n/n!,   M_n = Σ_k p_k·W_ckⁿ          as many n as max |δ_k| asks for

The moments M_n [B, C] are the same for all coordinates. Where more moves, or by more than 1, the rules of product,
log-softmax and loss answer one after the other.
"""

from math import factorial
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Block, Change, take
from deepzero_core.perturb.rewriting.head import linear_cross_entropy
from deepzero_core.perturb.rules.parts import change_of_part
from deepzero_core.perturb.rules.registry import Call, Result, only_change, only_one_hot, rule, within

aten = torch.ops.aten

_LARGE = 1.0
TERMS = {1 / 1024: 3, 1 / 16: 5, 1 / 4: 7, 1.0: 12}
"""By the largest |δ_k|: how many terms give S to 1e-9 of it."""
_ALL_DIGITS = {1.0: 18}
"""The same for float64, to its last digit."""


@rule(linear_cross_entropy)
def head(call: Call) -> Result:
    found = _one_score(call) or _one_feature(call) if call.precision != "value" else None
    if found is None:
        return _one_after_the_other(call)
    shift, of_class = found
    return Change(_reduced(call, shift.log1p() - of_class))


def _one_score(call: Call) -> tuple[Tensor, Tensor] | None:
    """(S, δ_t), [P, B] each, where one bias or weight moves."""
    bias, weight = only_one_hot(call, 0), only_one_hot(call, 2)
    if bias is not None and call.args[0].ndim == 1:
        classes, moved = bias.positions, bias.steps[:, None]
    elif weight is not None:
        features, classes = torch.unravel_index(weight.positions, call.args[2].shape)
        moved = weight.steps[:, None] * call.args[1].mT[features]
    else:
        return None
    if not within(moved, _LARGE):
        return None
    return _shares(call).mT[classes] * moved.expm1(), torch.where(call.args[3] == classes[:, None], moved, 0)


def _one_feature(call: Call) -> tuple[Tensor, Tensor] | None:
    """(S, δ_t), [P, B] each, where one feature moves."""
    change, (weight, targets) = only_change(call, 1), call.args[2:4]
    if change is None or change.block is None or change.block.dim != 1 or change.width != 1:
        return None
    moved, block = change.delta.squeeze(2), change.block
    largest = take(call.once("largest", lambda: weight.abs().amax(1)), Block(0, block.start), 1)
    known = _ALL_DIGITS if moved.dtype == torch.float64 else TERMS
    terms = next((terms for radius, terms in known.items() if within(moved * largest, radius)), None)
    if terms is None:
        return None
    features = torch.tensor(block.start, device=weight.device)
    first, *others = call.once(f"{terms} moments", lambda: _moments(call, terms))[:, features].flip(0)
    total = first
    for moment in others:
        total = torch.addcmul(moment, total, moved)
    classes = call.once("classes", lambda: targets.clamp(0, weight.shape[1] - 1))
    return total * moved, moved * weight[features][:, classes]


def _shares(call: Call) -> Tensor:
    """p, [B, K]."""
    return call.once("shares", lambda: torch.addmm(*call.args[:3]).softmax(1))


def _moments(call: Call, terms: int) -> Tensor:
    """M_n/n! of n = 1, 2, …: [terms, C, B]."""
    weight, shares = call.args[2].double(), _shares(call).double()
    moments = [weight.pow(n) @ shares.mT / factorial(n) for n in range(1, terms + 1)]
    return torch.stack(moments).to(call.args[2].dtype)


def _reduced(call: Call, losses: Tensor) -> Tensor:
    """Losses of the examples [P, B] as the loss takes them together; ignored classes weigh nothing."""
    *_, targets, class_weight, reduction, ignored = call.args
    counted = call.once("counted", lambda: targets != ignored)
    losses = torch.where(counted, losses, 0)
    weights = counted.to(losses.dtype)
    if class_weight is not None:
        weights = call.once("weights", lambda: weights * class_weight[targets.clamp(0, len(class_weight) - 1)])
        losses = losses * weights
    match reduction:
        case 0:
            return losses
        case 1:
            return torch.div(losses.sum(1), call.once("sum", weights.sum))
        case _:
            return losses.sum(1)


def _one_after_the_other(call: Call) -> Result:
    bias, inputs, weight, *further = call.args
    scores = call.once("scores", lambda: torch.addmm(bias, inputs, weight))
    logarithms = call.once("logarithms", lambda: scores.log_softmax(1))
    whole = call.once("whole", lambda: aten.nll_loss_forward.default(logarithms, *further))
    product, softmax, loss = aten.addmm.default, aten._log_softmax.default, aten.nll_loss_forward.default
    z = change_of_part(call, "product", product, (bias, inputs, weight), {}, call.changes[:3], scores)
    z = _rounded(call, z, scores)
    y = change_of_part(call, "softmax", softmax, (scores, 1, False), {}, (z, None, None), logarithms)
    y = _rounded(call, y, logarithms)
    found: Any = change_of_part(call, "loss", loss, (logarithms, *further), {}, (y, *[None] * len(further)), whole)
    return None if found is None else found[0]


def _rounded(call: Call, change: Any, base: Tensor) -> Any:
    """With values in place of differences, what is left of a change."""
    if call.precision != "value" or not isinstance(change, Change):
        return change
    value = take(base, change.block, change.width if change.block else 0)
    return Change((value + change.delta) - value, change.block)
