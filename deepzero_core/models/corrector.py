"""Networks that correct a coarse solver: from the fields after a step, [B, C, Y, X], to what is to be added to them.

Input and output are in units of the standard deviations of the training data; output [B, 2, Y, X].
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core.errors import RequestError, suggest

Padding = Literal["zeros", "circular"]
PADDINGS: tuple[Padding, ...] = ("zeros", "circular")
GAIN = 0.1
"""Of the last convolution's first weights: a solver corrected at random must not blow up before it is trained."""


class ResidualCorrector(nn.Module):
    """conv5×5(w) – blocks × [x + conv5×5(conv5×5(x))] – conv5×5(2), LeakyReLU of slope 0.3 after every sum and layer.

    Parameters: 25·C·w + w + blocks·2·(25·w² + w) + 50·w + 2; 260,354 of width 32 and 5 blocks at 3 channels.
    padding: "circular" where the fields are periodic, else "zeros".

    Source: Um et al. 2020, with the slope of its framework.
    RequestError: an unknown padding; channels, width or blocks below 1.
    """

    def __init__(self, channels: int, *, width: int = 32, blocks: int = 5, padding: Padding = "zeros") -> None:
        super().__init__()
        _check(padding, channels, width, blocks)
        conv = partial(_conv, padding=padding)
        self.first = conv(channels, width)
        self.blocks = nn.ModuleList(_Block(width, conv) for _ in range(blocks))
        self.last = _gentle(conv(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = _leaky(self.first(x))
        for block in self.blocks:
            x = _leaky(block(x))
        corrected: Tensor = self.last(x)
        return corrected


class PlainCorrector(nn.Module):
    """A chain of k×k convolutions, ReLU between them, to 2 channels; 56,898 parameters of widths 32, 64 at 3 channels.

    kernel: k, odd; that of the source is 5. Few weights serve better with 3.

    Source: Um et al. 2020. RequestError: an unknown padding, no widths or one below 1, an even kernel.
    """

    def __init__(
        self, channels: int, *, widths: Sequence[int] = (32, 64), kernel: int = 5, padding: Padding = "zeros"
    ) -> None:
        super().__init__()
        _check(padding, channels, len(widths), *widths)
        if kernel < 1 or kernel % 2 == 0:
            raise RequestError(f"the kernel of a corrector must be odd, for fields to keep their size, not {kernel}")
        sizes = (channels, *widths)
        conv = partial(_conv, padding=padding, kernel=kernel)
        hidden = [conv(*pair) for pair in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*(part for each in hidden for part in (each, nn.ReLU())))
        self.last = _gentle(conv(sizes[-1], 2))

    def forward(self, x: Tensor) -> Tensor:
        corrected: Tensor = self.last(self.layers(x))
        return corrected


class _Block(nn.Module):
    def __init__(self, width: int, conv: Callable[[int, int], nn.Conv2d]) -> None:
        super().__init__()
        self.first, self.second = conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.second(_leaky(self.first(x)))
        return x + changed


CORRECTORS: dict[str, Callable[..., nn.Module]] = {
    "residual": ResidualCorrector,
    "plain": PlainCorrector,
    "small": partial(PlainCorrector, widths=(8, 8)),
}


def build_corrector(name: str, channels: int, *, padding: Padding = "zeros") -> nn.Module:
    """A corrector by name: "residual" and "plain" of Um et al., and "small", for two cores.

    RequestError: an unknown name; see the classes.
    """
    if name not in CORRECTORS:
        raise RequestError(f"unknown corrector {name!r}: {suggest(name, CORRECTORS)}")
    return CORRECTORS[name](channels, padding=padding)


def _check(padding: Padding, *sizes: int) -> None:
    if padding not in PADDINGS:
        raise RequestError(f"unknown padding {padding!r}: {suggest(padding, PADDINGS)}")
    if min(sizes) < 1:
        raise RequestError(f"channels, widths and blocks of a corrector must be at least 1, not {min(sizes)}")


def _conv(channels: int, width: int, *, padding: Padding, kernel: int = 5) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel_size=kernel, padding=kernel // 2, padding_mode=padding)


def _gentle(conv: nn.Conv2d) -> nn.Conv2d:
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(GAIN)
    return conv


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.3)
