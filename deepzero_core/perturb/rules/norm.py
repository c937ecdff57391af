"""Batch normalisation; m and v are mean and variance over batch and space, x̂ = y − m, s = (v + ε)^−½.

With batch statistics every perturbation has its own:

    Δm = mean δ,   Δv = 2·mean(x̂·δ) + mean δ² − Δm²,   s' = (v + Δv + ε)^−½,   Δs = −Δv·s²·s'²/(s + s')
    Δn = s'·δ + Δs·x̂ − s'·Δm              the change of the normalised value n = x̂·s

Nothing of the size of y cancels: mean x̂ = 0, and what is lost in mean δ² − Δm² is small against δ². With running
statistics Δn = δ·s. Either way the result changes by γ·Δn + δγ·(n + Δn) + δβ. No rule touches the running statistics.
Statistics couple the batch, not the channels: a block of channels stays a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Block, Change, OneHot, Replaced, dense, one_hot_block, take
from deepzero_core.perturb.rules.registry import Call, Result, rule

aten = torch.ops.aten


@dataclass(frozen=True)
class _OnChannels:
    """Everything on one block of channels: δ [1 or P, B, w, …], per-channel values [1 or P, 1, w, 1…].

    `values` [B, C, …] is the operand, every channel of it, and mean [C] its mean.
    """

    block: Block | None
    width: int
    values: Tensor
    mean: Tensor
    scale: Tensor
    delta: Tensor | None
    gamma: Tensor | None
    delta_gamma: Tensor | None
    delta_beta: Tensor | None

    @property
    def centred(self) -> Tensor:
        """x̂ on the block."""
        means = take(self.mean, Block(0, self.block.start) if self.block else None, self.width)
        taken = take(self.values, self.block, self.width)
        return taken - means.reshape(len(means), 1, -1, *[1] * (self.values.ndim - 2))


@rule(aten.native_batch_norm.default)
def batch_norm(call: Call) -> Result:
    training = call.args[5]
    if any(position > 2 for position in call.changed()) or call.output[0].ndim < 2:
        return None
    on = _gather(call, training)
    if on is None:
        return None
    average, rescale = _statistics(on, on.delta) if on.delta is not None and training else (None, None)
    shape = list(call.output[0].shape)
    shape[1] = on.width if on.block else shape[1]
    change = Change(_affine(on, average, rescale).expand(call.count, *shape), on.block)
    if average is None or rescale is None:
        return change, None, None
    return change, _per_channel(average, on.block), _per_channel(rescale, on.block)


def _statistics(on: _OnChannels, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(Δm, Δs), per perturbation and channel: [P, 1, w, 1…]."""
    axes = [1, *range(3, delta.ndim)]
    average = delta.mean(axes, keepdim=True)
    square = torch.add(delta, on.centred, alpha=2).mul_(delta).mean(axes, keepdim=True)
    variance = square - average.square()
    new_scale = (on.scale.square().reciprocal() + variance).rsqrt()
    return average, -variance * (on.scale * new_scale).square() / (on.scale + new_scale)


def _affine(on: _OnChannels, average: Tensor | None, rescale: Tensor | None) -> Tensor:
    """γ·Δn + δγ·(n + Δn) + δβ, the coefficients of δ and x̂ collected first: a pass over the values costs most."""
    slope = _sum(on.gamma, on.delta_gamma)
    constant = on.delta_beta
    total: Tensor | None = None
    if on.delta is not None:
        scale = on.scale if rescale is None else on.scale + rescale
        factor = scale if slope is None else slope * scale
        if average is not None:
            constant = _sum(constant, -factor * average)
        total = factor * on.delta if constant is None else torch.addcmul(constant, factor, on.delta)
    along = _sum(
        None if rescale is None else rescale if slope is None else slope * rescale,
        None if on.delta_gamma is None else on.delta_gamma * on.scale,
    )
    if total is not None:
        return total if along is None else total.addcmul_(along, on.centred)
    parts = _sum(None if along is None else along * on.centred, constant)
    assert parts is not None, "a rule is called when something changes"
    return parts


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b where None stands for 0."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _per_channel(change: Tensor, block: Block | None) -> Change:
    """[P, 1, w, 1…] → a change of a [C] tensor."""
    return Change(change.flatten(1), Block(0, block.start) if block else None)


def _gather(call: Call, training: bool) -> _OnChannels | None:
    inputs, gamma = call.args[0], call.args[1]
    changes: list[Change | None] = []
    for position in range(3):
        change = call.change(position)
        if isinstance(change, Replaced):
            return None
        changes.append(one_hot_block(change, call.args[position].shape) if isinstance(change, OneHot) else change)
    block, width = _shared_channels(changes)

    def channels(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        on_block = take(values, Block(0, block.start) if block else None, width)
        return on_block.reshape(on_block.shape[0], 1, -1, *[1] * (inputs.ndim - 2))

    def delta_of(position: int) -> Tensor | None:
        change = changes[position]
        if change is None:
            return None
        full = change.delta if block else dense(change, call.args[position].shape)
        return full if position == 0 else full.reshape(full.shape[0], 1, -1, *[1] * (inputs.ndim - 2))

    mean = call.output[1] if training else call.args[3]
    scale = channels(call.output[2] if training else (call.args[4] + call.args[7]).rsqrt())
    assert scale is not None
    width = width if block else inputs.shape[1]
    return _OnChannels(block, width, inputs, mean, scale, delta_of(0), channels(gamma), delta_of(1), delta_of(2))


def _shared_channels(changes: list[Change | None]) -> tuple[Block | None, int]:
    """The block of channels that all changes share (axis 1 of the inputs, axis 0 of γ and β)."""
    found = set()
    for position, change in enumerate(changes):
        if change is None:
            continue
        if change.block is None or change.block.dim != (1 if position == 0 else 0):
            return None, 0
        found.add((change.block.start, change.width))
    if len(found) != 1:
        return None, 0
    start, width = found.pop()
    return Block(1, start), width
