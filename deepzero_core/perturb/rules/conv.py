"""Convolutions in one, two and three dimensions, any stride, padding, dilation and groups.

    weight W[o, i, k…] moves by s:   Δ[:, o] = s · (input channel i of o's group, shifted by k, strided): no convolution
    bias b[o] moves by s:            Δ[:, o] = s
    input moves by δ:                Δ = conv(δ, W)    with only the columns of W that meet a block of channels

Transposed convolutions are linear in their input too; their weights take the general path.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.perturb.changes import Block, Change, OneHot, dense
from deepzero_core.perturb.rules.registry import Call, Result, only_change, only_one_hot, rule

aten = torch.ops.aten


@rule(aten.convolution.default)
def convolution(call: Call) -> Result:
    if call.args[0].ndim != call.args[1].ndim:
        return None
    bias, weight, inputs = only_one_hot(call, 2), only_one_hot(call, 1), only_change(call)
    if bias is not None:
        return _bias(call, bias)
    if weight is not None and not call.args[6]:
        return _weight(call, weight)
    if inputs is not None:
        return _inputs(call, inputs)
    return None


def _bias(call: Call, change: OneHot) -> Change:
    batch, _, *space = call.output.shape
    delta = change.steps.view(-1, *[1] * call.output.ndim)
    return Change(delta.expand(-1, batch, 1, *space), Block(1, tuple(change.positions.tolist())))


def _weight(call: Call, change: OneHot) -> Change:
    inputs, weight = call.args[0], call.args[1]
    stride, padding, dilation, groups = call.args[3], call.args[4], call.args[5], call.args[8]
    out_channel, in_channel, *tap = torch.unravel_index(change.positions, weight.shape)
    group = out_channel // (weight.shape[0] // groups)
    windows = _windows(inputs, call.output.shape[2:], stride, padding, dilation, weight.shape[2:])
    shifted = windows[(group * weight.shape[1] + in_channel, *tap)]
    delta = change.steps.view(-1, *[1] * (shifted.ndim - 1)) * shifted
    return Change(delta.unsqueeze(2), Block(1, tuple(out_channel.tolist())))


def _windows(
    inputs: Tensor,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel: Sequence[int],
) -> Tensor:
    """What each tap of the kernel sees, as a view: [C, *kernel, B, *output_size]."""
    pad = [amount for axis in reversed(padding) for amount in (axis, axis)]
    padded = F.pad(inputs, pad).contiguous() if any(padding) else inputs.contiguous()
    batch_stride, channel_stride, *space = padded.stride()
    sizes = [inputs.shape[1], *kernel, inputs.shape[0], *output_size]
    taps = [s * d for s, d in zip(space, dilation, strict=True)]
    steps = [s * d for s, d in zip(space, stride, strict=True)]
    return padded.as_strided(sizes, [channel_stride, *taps, batch_stride, *steps])


def _inputs(call: Call, change: Change) -> Change:
    weight, transposed, groups = call.args[1], call.args[6], call.args[8]
    if change.block is None or change.block.dim != 1 or groups != 1:
        return Change(_convolve(call, dense(change, call.args[0].shape), weight))
    # Perturbations that share their block form one batch for one convolution over the channels they touch.
    runs = [(start, len(list(run))) for start, run in groupby(change.block.start)]
    channel_axis = 0 if transposed else 1
    results = [
        _convolve(call, delta, weight.narrow(channel_axis, start, change.width))
        for (start, _), delta in zip(runs, change.delta.split([length for _, length in runs]), strict=True)
    ]
    return Change(results[0] if len(results) == 1 else torch.cat(results))


def _convolve(call: Call, delta: Tensor, weight: Tensor) -> Tensor:
    """The convolution of deltas [P, B, C, …] without its bias, P and B folded into one batch."""
    folded: Tensor = aten.convolution.default(delta.flatten(0, 1), weight, None, *call.args[3:])
    return folded.view(*delta.shape[:2], *folded.shape[1:])
