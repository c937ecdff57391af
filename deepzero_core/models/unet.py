"""A small U-Net as a denoiser: what a pixel is, judged by ever wider surroundings.

Input [B, C, H, W]; output x − net(x), of the same shape, any H and W.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core.errors import RequestError


class UNet(nn.Module):
    """`depth` times halved and doubled again, with the finer features beside the coarser ones on the way back.

    Level k has width·2ᵏ channels in two [conv3×3 – BatchNorm – ReLU]. An odd side is halved upwards, and what comes
    back is brought to the size of the level that it returns to (nearest neighbours). The last convolution starts at
    zero, so that the network starts as the identity.

    Source: Ronneberger, Fischer and Brox 2015, with padding and a residual output.
    RequestError: depth or width below 1.
    """

    def __init__(self, channels: int, *, depth: int = 2, width: int = 16) -> None:
        super().__init__()
        if depth < 1 or width < 1:
            raise RequestError(
                f"a unet has a depth and a width of at least 1, but was given depth {depth} and width {width}"
            )
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(_block(before, after) for before, after in pairwise([channels, *widths]))
        self.up = nn.ModuleList(_block(3 * finer, finer) for finer in reversed(widths[:-1]))
        self.last = nn.Conv2d(width, channels, kernel_size=3, padding=1, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        features = self.down[0](x)
        finer = []
        for block in list(self.down)[1:]:
            finer.append(features)
            features = block(F.max_pool2d(features, 2, ceil_mode=True))
        for block in self.up:
            beside = finer.pop()
            wide = F.interpolate(features, size=beside.shape[-2:], mode="nearest")
            features = block(torch.cat([beside, wide], 1))
        noise: Tensor = self.last(features)
        return x - noise


def _block(in_width: int, width: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm_relu(in_width, width), *_conv_norm_relu(width, width))


def _conv_norm_relu(in_width: int, width: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_width, width, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv, nn.BatchNorm2d(width), nn.ReLU()
