"""The convolutional autoencoder of ZO-AE-DS: few numbers between two networks, for finite differences to work on.

encoder: [B, C, H, W] → [B, latent]; decoder: [B, latent] → [B, C, H, W]; the module is both, one after the other.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from deepzero_core.errors import RequestError

_COARSEST = 4
_SMALLEST_IMAGE = 8


class Autoencoder(nn.Module):
    """Images halved until a side is at most 4, a linear layer to the latent, and the same way back.

    Every halving is [conv3×3(stride 2) – BatchNorm – ReLU] with width, 2·width and then 4·width channels; an odd side
    is halved upwards. Every doubling is nearest neighbours to the size before and [conv3×3 – BatchNorm – ReLU]; the
    last one is a convolution alone, so that the output is not bounded.

    image_size: side of the square image, or (H, W), pixels, at least 8. latent: numbers per image.
    Source: Zhang et al. 2022 (How to robustify black-box ML models?), made to fit any size.
    RequestError: an image below 8 pixels, width or latent below 1.
    """

    def __init__(
        self, channels: int, image_size: int | tuple[int, int], *, latent: int = 1152, width: int = 32
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(size) < _SMALLEST_IMAGE:
            raise RequestError(
                f"images of {size[0]}×{size[1]} pixels are too small for an autoencoder: "
                f"{_SMALLEST_IMAGE}×{_SMALLEST_IMAGE} is the least"
            )
        if latent < 1 or width < 1:
            raise RequestError(
                f"an autoencoder has a latent and a width of at least 1, but was given {latent} and {width}"
            )
        sizes = [size]
        while min(sizes[-1]) > _COARSEST:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        widths = [channels, *(width << min(level, 2) for level in range(len(sizes) - 1))]
        coarsest = (widths[-1], *sizes[-1])
        self.latent = latent
        self.encoder = _encoder(widths, coarsest, latent)
        self.decoder = _decoder(widths, coarsest, latent, sizes)

    def forward(self, x: Tensor) -> Tensor:
        images: Tensor = self.decoder(self.encoder(x))
        return images


def _encoder(widths: Sequence[int], coarsest: tuple[int, int, int], latent: int) -> nn.Sequential:
    halvings = [
        layer
        for before, after in pairwise(widths)
        for layer in (_conv3x3(before, after, stride=2), nn.BatchNorm2d(after), nn.ReLU())
    ]
    return nn.Sequential(*halvings, nn.Flatten(), nn.Linear(math.prod(coarsest), latent))


def _decoder(
    widths: Sequence[int], coarsest: tuple[int, int, int], latent: int, sizes: Sequence[tuple[int, int]]
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(latent, math.prod(coarsest)), nn.ReLU(), nn.Unflatten(1, coarsest)]
    for level in range(len(sizes) - 2, 0, -1):
        wide, narrow = widths[level + 1], widths[level]
        layers += [nn.Upsample(sizes[level]), _conv3x3(wide, narrow), nn.BatchNorm2d(narrow), nn.ReLU()]
    return nn.Sequential(*layers, nn.Upsample(sizes[0]), nn.Conv2d(widths[1], widths[0], kernel_size=3, padding=1))


def _conv3x3(in_width: int, width: int, *, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_width, width, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv
