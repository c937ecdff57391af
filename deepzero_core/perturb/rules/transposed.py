"""The owner rule of transposed convolutions, in one, two and three dimensions. W is [C_in, C_out/groups, k…].

out[b, o, q·stride + k·dilation − padding] = Σ x[b, i, q]·W[i, o, k]
W[i, o, k…] moves by s:   Δ[:, o] = s·(input channel i, spread out by the stride, shifted by k): no convolution
"""

import torch

from deepzero_core.perturb.changes import Block, Change, OneHot
from deepzero_core.perturb.rules.registry import Call


def weight(call: Call, change: OneHot) -> Change:
    """The change of the one output channel that a moved weight feeds: [P, B, 1, *output]."""
    inputs, weights = call.args[0], call.args[1]
    stride, padding, dilation, groups = call.args[3], call.args[4], call.args[5], call.args[8]
    in_channel, out_channel, *tap = torch.unravel_index(change.positions, weights.shape)
    group = in_channel // (weights.shape[0] // groups)
    seen = inputs.transpose(0, 1)[in_channel] * change.steps.view(-1, *[1] * (inputs.ndim - 1))
    # What lies outside the output is written too, and cut off.
    written = [
        (size - 1) * step + (taps - 1) * gap + 1
        for size, step, taps, gap in zip(inputs.shape[2:], stride, weights.shape[2:], dilation, strict=True)
    ]
    needed = [before + size for before, size in zip(padding, call.output.shape[2:], strict=True)]
    canvas = seen.new_zeros([*seen.shape[:2], *map(max, written, needed)])
    own, batch, *space = canvas.stride()
    taps = [step * gap for step, gap in zip(space, dilation, strict=True)]
    steps = [step * apart for step, apart in zip(space, stride, strict=True)]
    places = canvas.as_strided([len(seen), *weights.shape[2:], *seen.shape[1:]], [own, *taps, batch, *steps])
    places[(torch.arange(len(seen), device=seen.device), *tap)] = seen
    for axis, (before, size) in enumerate(zip(padding, call.output.shape[2:], strict=True)):
        canvas = canvas.narrow(2 + axis, before, size)
    return Change(canvas.unsqueeze(2), Block(1, tuple((group * weights.shape[1] + out_channel).tolist())))
