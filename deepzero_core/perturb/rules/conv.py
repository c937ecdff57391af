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
from deepzero_core.perturb.native import kernels
from deepzero_core.perturb.rules import transposed
from deepzero_core.perturb.rules.registry import Call, Result, only_change, only_one_hot, rule

aten = torch.ops.aten

_WINOGRAD_CHANNELS = {"float32": 16, "bfloat16": 32}
"""From so many input channels on, Winograd's fewer products are faster than direct ones in this precision: on one
AVX-512 core 1.3× at 16 and 2.2× at 64 in float32; 1.1× at 32 and 1.3× at 64 against bfloat16."""
_WINOGRAD_SPACE = 4
"""A smaller result would leave most of a tile unused."""


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
    if kernels.suits(call.output.unsqueeze(0)):
        delta = delta.movedim(-1, 1)
    return Change(delta.unsqueeze(2), Block(1, tuple(out_channel.tolist())))


def _windows(call: Call) -> Tensor:
    """What each tap of the kernel sees, as a view: [C, *kernel, B, *output_size], where kernels run with B last."""
    inputs, weight = call.args[0], call.args[1]
    stride, padding, dilation = call.args[3], call.args[4], call.args[5]
    native = kernels.suits(call.output.unsqueeze(0))

    def padded() -> Tensor:
        wider = F.pad(inputs, [amount for axis in reversed(padding) for amount in (axis, axis)])
        return kernels.batch_last(wider, 0) if native else wider.contiguous()

    source = call.once_for_parameter("padded", padded)
    batch_stride, channel_stride, *space = source.stride()
    taps = [s * d for s, d in zip(space, dilation, strict=True)]
    steps = [s * d for s, d in zip(space, stride, strict=True)]
    place = len(space) if native else 0
    sizes = list(call.output.shape[2:])
    sizes.insert(place, inputs.shape[0])
    steps.insert(place, batch_stride)
    return source.as_strided([inputs.shape[1], *weight.shape[2:], *sizes], [channel_stride, *taps, *steps])


def _inputs(call: Call, change: Change) -> Change:
    turned, groups = call.args[6], call.args[8]
    if groups == 1 and not turned and kernels.suits(change.delta):
        return _native(call, change)
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


def _native(call: Call, change: Change) -> Change:
    weight, (stride, padding, dilation) = call.args[1], call.args[3:6]
    kernel, thin = weight.shape[2:], change.block is not None and change.block.dim == 1
    delta = change.delta if thin else dense(change, call.args[0].shape)
    precision = "bfloat16" if call.precision == "bfloat16" and kernels.has_bfloat16() else "float32"
    plain = (list(kernel), list(stride), list(dilation)) == ([3, 3], [1, 1], [1, 1])
    tiled = plain and min(call.output.shape[2:]) >= _WINOGRAD_SPACE
    winograd = not thin and tiled and weight.shape[1] >= _WINOGRAD_CHANNELS[precision]
    bfloat16 = not thin and not winograd and precision == "bfloat16"
    if winograd:
        packed = call.once("winograd", lambda: kernels.pack_winograd(weight))
    else:
        packed = call.once(f"packed {bfloat16}", lambda: kernels.pack(weight, bfloat16))
    start = change.block.start if thin and change.block else None
    return Change(
        kernels.convolve(
            delta, packed, kernel, stride, padding, dilation, call.output.shape[2:],
            start=start, winograd=winograd, bfloat16=bfloat16,
        )
    )  # fmt: skip
