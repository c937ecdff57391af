"""Batch normalisation; m and v are mean and variance over batch and space, x̂ = y − m, s = (v + ε)^−½.

With batch statistics every perturbation has its own:

    δc = δ − mean δ,   Δv = mean(2·x̂·δc + δc²),   s' = (v + Δv + ε)^−½,   Δs = −Δv·s²·s'²/(s + s')
    Δn = δc·s' + x̂·Δs                     the change of the normalised value n = x̂·s

With running statistics Δn = δ·s. Either way the result changes by γ·Δn + δγ·(n + Δn) + δβ. No rule touches the running
statistics. Statistics couple the batch, not the channels: a block of channels stays a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Block, Change, OneHot, Replaced, dense, one_hot_block, take
from deepzero_core.perturb.rules.registry import Call, Result, rule

aten = torch.ops.aten


@dataclass(frozen=True)
class _OnChannels:
    """Everything on one block of channels: inputs [1 or P, B, w, …], per-channel values [1 or P, 1, w, 1…]."""

    block: Block | None
    inputs: Tensor
    mean: Tensor
    scale: Tensor
    delta: Tensor | None
    gamma: Tensor | None
    delta_gamma: Tensor | None
    delta_beta: Tensor | None


@rule(aten.native_batch_norm.default)
def batch_norm(call: Call) -> Result:
    training = call.args[5]
    if any(position > 2 for position in call.changed()) or call.output[0].ndim < 2:
        return None
    gathered = _gather(call, training)
    if gathered is None:
        return None
    axes = [1, *range(3, gathered.inputs.ndim)]
    centred = gathered.inputs - gathered.mean
    normal = centred * gathered.scale
    shift, mean_change, scale_change = None, None, None
    if gathered.delta is not None and not training:
        shift = gathered.delta * gathered.scale
    elif gathered.delta is not None:
        average = gathered.delta.mean(axes, keepdim=True)
        delta = gathered.delta - average
        variance = ((2 * centred + delta) * delta).mean(axes, keepdim=True)
        new_scale = (gathered.scale.square().reciprocal() + variance).rsqrt()
        rescale = -variance * (gathered.scale * new_scale).square() / (gathered.scale + new_scale)
        shift = delta * new_scale + centred * rescale
        mean_change = _per_channel(average, gathered.block)
        scale_change = _per_channel(rescale, gathered.block)
    change = _affine(normal, shift, gathered)
    shape = list(call.output[0].shape)
    if gathered.block:
        shape[1] = gathered.inputs.shape[2]
    return Change(change.expand(call.count, *shape), gathered.block), mean_change, scale_change


def _affine(normal: Tensor, shift: Tensor | None, on: _OnChannels) -> Tensor:
    """γ·Δn + δγ·(n + Δn) + δβ."""
    terms = []
    if shift is not None:
        terms.append(shift if on.gamma is None else on.gamma * shift)
    if on.delta_gamma is not None:
        terms.append(on.delta_gamma * (normal if shift is None else normal + shift))
    if on.delta_beta is not None:
        terms.append(on.delta_beta)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


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

    if training:
        mean, scale = channels(call.output[1]), channels(call.output[2])
    else:
        mean, scale = channels(call.args[3]), channels((call.args[4] + call.args[7]).rsqrt())
    assert mean is not None and scale is not None
    return _OnChannels(
        block, take(inputs, block, width), mean, scale, delta_of(0), channels(gamma), delta_of(1), delta_of(2)
    )


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
