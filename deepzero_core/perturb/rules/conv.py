"""Convolutions in one, two and three dimensions, any stride, padding, dilation and groups.

    weight W[o, i, k…] moves by s:   Δ[:, o] = s · (input channel i of o's group, shifted by k, strided): no convolution
    bias b[o] moves by s:            Δ[:, o] = s
    input moves by δ:                Δ = conv(δ, W)    with only the columns of W that meet a block of channels

Transposed convolutions are linear in their input too; for their weights see `transposed`.
"""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.perturb.changes import Block, Change, OneHot, dense
from deepzero_core.perturb.rules import transposed
from deepzero_core.perturb.rules.registry import Call, Result, only_change, only_one_hot, rule

aten = torch.ops.aten


@rule(aten.convolution.default)
def convolution(call: Call) -> Result:
    if call.args[0].ndim != call.args[1].ndim:
        return None
    bias, weight, inputs = only_one_hot(call, 2), only_one_hot(call, 1), only_change(call)
    if bias is not None:
        return _bias(call, bias)
    if weight is not None:
        return transposed.weight(call, weight) if call.args[6] else _weight(call, weight)
    if inputs is not None:
        return _inputs(call, inputs)
    return None


def _bias(call: Call, change: OneHot) -> Change:
    batch, _, *space = call.output.shape
    delta = change.steps.view(-1, *[1] * call.output.ndim)
    return Change(delta.expand(-1, batch, 1, *space), Block(1, tuple(change.positions.tolist())))


def _weight(call: Call, change: OneHot) -> Change:
    weight, groups = call.args[1], call.args[8]
    out_channel, in_channel, *tap = torch.unravel_index(change.positions, weight.shape)
    group = out_channel // (weight.shape[0] // groups)
    seen = _windows(call)[(group * weight.shape[1] + in_channel, *tap)]
    delta = seen.mul_(change.steps.view(-1, *[1] * (seen.ndim - 1)))
    return Change(delta.unsqueeze(2), Block(1, tuple(out_channel.tolist())))


def _windows(call: Call) -> Tensor:
    """What each tap of the kernel sees, as a view: [C, *kernel, B, *output_size]."""
    inputs, weight = call.args[0], call.args[1]
    stride, padding, dilation = call.args[3], call.args[4], call.args[5]
    amounts = [amount for axis in reversed(padding) for amount in (axis, axis)]
    source = call.once_for_parameter("padded", lambda: F.pad(inputs, amounts).contiguous())
    batch_stride, channel_stride, *space = source.stride()
    taps = [s * d for s, d in zip(space, dilation, strict=True)]
    steps = [s * d for s, d in zip(space, stride, strict=True)]
    sizes = [inputs.shape[1], *weight.shape[2:], inputs.shape[0], *call.output.shape[2:]]
    return source.as_strided(sizes, [channel_stride, *taps, batch_stride, *steps])


def _inputs(call: Call, change: Change) -> Change:
    turned, groups = call.args[6], call.args[8]
    weight = call.args[1]
    if change.block is None or change.block.dim != 1 or groups != 1:
        return Change(_convolve(call, dense(change, call.args[0].shape), weight))
    # Perturbations that share their block form one batch for one convolution over the channels they touch.
    runs = [(start, len(list(run))) for start, run in groupby(change.block.start)]
    channel_axis = 0 if turned else 1
    results = [
        _convolve(call, delta, weight.narrow(channel_axis, start, change.width))
        for (start, _), delta in zip(runs, change.delta.split([length for _, length in runs]), strict=True)
    ]
    return Change(results[0] if len(results) == 1 else torch.cat(results))


def _convolve(call: Call, delta: Tensor, weight: Tensor) -> Tensor:
    """The convolution of deltas [P, B, C, …] without its bias, P and B folded into one batch."""
    folded: Tensor
    if call.precision == "bfloat16":
        folded = aten.convolution.default(delta.flatten(0, 1).bfloat16(), weight.bfloat16(), None, *call.args[3:])
    else:
        folded = aten.convolution.default(delta.flatten(0, 1), weight, None, *call.args[3:])
    return folded.to(delta.dtype).view(*delta.shape[:2], *folded.shape[1:])
