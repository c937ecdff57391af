"""Softmax along one axis and its relatives, p = softmax(y), S = Σ p·expm1(δ).

    log-softmax:  Δ = δ − log1p(S)
    softmax:      Δ = p·(expm1(δ) − S)/(1 + S)
    logsumexp:    Δ = log1p(S)

A block of changed classes takes the exponentials of these classes alone, a block along another axis stays one.
1 + S cancels and expm1 overflows where δ is large; there the difference of the values does not cancel, and is taken.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Change, dense, difference, take
from deepzero_core.perturb.rules.general import widened
from deepzero_core.perturb.rules.reduction import summed_over
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule, within

aten = torch.ops.aten

_LARGE = 1.0


@rule(aten._log_softmax.default)
def log_softmax(call: Call) -> Result:
    change = only_change(call)
    if change is None or call.argument(2) or not call.output.ndim:
        return None
    if not within(change.delta, _LARGE):
        return _of_values(call, change, [call.args[1]], lambda y, axes: y.log_softmax(axes[0]))
    shift = _shift(call, change, [call.args[1]], call.output.exp)
    moved = -shift.log1p()
    if change.block is None or not _crosses(call, change, [call.args[1]]):
        return Change(change.delta + moved, change.block)
    return Change(dense(change, call.output.shape) + moved)


@rule(aten._softmax.default, aten._safe_softmax.default)
def softmax(call: Call) -> Result:
    change = only_change(call)
    if change is None or call.argument(2) or not call.output.ndim:
        return None
    if not within(change.delta, _LARGE):
        return _of_values(call, change, [call.args[1]], lambda y, axes: call.target(y, axes[0], *call.args[2:]))
    own = take(call.output, change.block, change.width if change.block else 0)
    growth = change.delta.expm1().mul_(own)
    shift = growth.sum(1 + call.args[1] % call.output.ndim, keepdim=True)
    if change.block is None or not _crosses(call, change, [call.args[1]]):
        return Change(growth.addcmul_(own, shift, value=-1).div_(1 + shift), change.block)
    grown = dense(Change(growth, change.block), call.output.shape)
    return Change(grown.addcmul_(call.output, shift, value=-1).div_(1 + shift))


@rule(aten.logsumexp.default)
def logsumexp(call: Call) -> Result:
    change, axes, keep = only_change(call), list(call.args[1]), bool(call.argument(2, False))
    if change is None or not call.args[0].ndim:
        return None
    if not within(change.delta, _LARGE):
        return _of_values(call, change, axes, lambda y, along: y.logsumexp(along, keepdim=keep))

    def probabilities() -> Tensor:
        total = call.args[0].logsumexp(axes, keepdim=True)
        share: Tensor = (call.args[0] - total).exp_().nan_to_num_(0.0)
        return share

    moved = _shift(call, change, axes, probabilities).log1p_()
    block = None if _crosses(call, change, axes) else change.block
    return summed_over(axes, keep, moved, block)


def _crosses(call: Call, change: Change, axes: Sequence[int]) -> bool:
    """Whether the change sits on a block of the classes themselves."""
    rank = call.args[0].ndim
    return change.block is not None and change.block.dim in [axis % rank for axis in axes]


def _shift(call: Call, change: Change, axes: Sequence[int], probabilities: Callable[[], Tensor]) -> Tensor:
    """S, [P, *s with 1 at the axes]."""
    share = call.on_block(change, "share", probabilities)
    along = [1 + axis % int(call.args[0].ndim) for axis in axes]
    return (share * change.delta.expm1()).sum(along, keepdim=True)


def _of_values(
    call: Call, change: Change, axes: Sequence[int], function: Callable[[Tensor, list[int]], Tensor]
) -> Change:
    """f(y + δ) − f(y) in the wider type; `function` takes the axes that it works along."""
    base: Tensor = widened(call.args[0])
    after = function(base + dense(change, base.shape), [1 + axis % base.ndim for axis in axes])
    before = call.once("wide", lambda: function(base, list(axes)))
    return Change(difference(after, before).to(call.output.dtype))
