"""The paper's small convolutional network, whose depth sets the number of parameters.

Input [B, C, H, W]; output, scores of the classes, [B, K].
"""

from collections import OrderedDict

from torch import nn

from deepzero_core.errors import RequestError


class CNN(nn.Sequential):
    """depth × [conv3×3(width, bias) – BatchNorm – ReLU – maxpool2] – global average – linear.

    Parameters: (9·C·w + 3w) + (depth − 1)·(9·w² + 3w) + K·(w + 1). With w = 18, C = 3 and K = 10 that is 730, 3,700,
    6,670, 9,640 and 12,610 at depths 1 to 5 (Chen et al. 2024, DeepZero).

    Every block halves the image, so that an image of side s takes at most ⌊log₂ s⌋ blocks: RequestError beyond.
    Convolutions start from He et al. 2015 with zero biases: with BatchNorm behind it a weight's scale is free, and
    the larger it is, the smaller a finite-difference step is in comparison.
    """

    def __init__(
        self, in_channels: int, num_classes: int, image_size: tuple[int, int], *, depth: int = 2, width: int = 18
    ) -> None:
        if width < 1:
            raise RequestError(f"the width of a cnn must be at least 1, but is {width}")
        deepest = min(image_size).bit_length() - 1
        pixels = f"{image_size[0]}×{image_size[1]} pixels"
        if deepest < 1:
            raise RequestError(f"images of {pixels} are too small for a cnn, whose blocks halve them: 2×2 is the least")
        if not 1 <= depth <= deepest:
            raise RequestError(
                f"a cnn of depth {depth} cannot take images of {pixels}, because every block halves them; "
                f"depth must be between 1 and {deepest}"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(depth):
            layers[f"block{block + 1}"] = _block(in_channels if block == 0 else width, width)
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(width, num_classes)
        super().__init__(layers)


def _block(in_channels: int, width: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None  # nn.Conv2d has one unless asked otherwise
    nn.init.zeros_(conv.bias)
    parts: list[tuple[str, nn.Module]] = [
        ("conv", conv),
        ("norm", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU()),
        ("pool", nn.MaxPool2d(2)),
    ]
    return nn.Sequential(OrderedDict(parts))
