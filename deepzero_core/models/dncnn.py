"""The denoiser of denoised smoothing: a plain convolutional network that answers with the noise it sees.

Input [B, C, H, W]; output x − net(x), of the same shape, any H and W.
"""

from torch import Tensor, nn

from deepzero_core.errors import RequestError


class DnCNN(nn.Module):
    """conv3×3 – ReLU, (depth − 2) × [conv3×3 – BatchNorm – ReLU], conv3×3; the input less what comes out.

    Parameters: (9·C·w + w) + (depth − 2)·(9·w² + 2w) + 9·w·C; 558,400 of depth 17 and width 64 at 3 channels.
    Weights start orthogonal and the last convolution at zero, so that the network starts as the identity. Only the
    first convolution has a bias.
    BatchNorm has ε = 1e-4 and momentum 0.95 in torch's sense, as in the published denoisers: what it uses in
    evaluation mode is almost the statistics of the last training batch.

    Source: Zhang et al. 2017, as in Salman et al. 2020 (denoised smoothing).
    RequestError: depth below 2, width below 1.
    """

    def __init__(self, channels: int, *, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        if depth < 2 or width < 1:
            raise RequestError(
                f"a dncnn has a depth of at least 2 and a width of at least 1, but was given {depth} and {width}"
            )
        first = nn.Sequential(_conv3x3(channels, width, bias=True), nn.ReLU())
        middle = (
            nn.Sequential(_conv3x3(width, width), nn.BatchNorm2d(width, eps=1e-4, momentum=0.95), nn.ReLU())
            for _ in range(depth - 2)
        )
        last = _conv3x3(width, channels)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(first, *middle, last)

    def forward(self, x: Tensor) -> Tensor:
        noise: Tensor = self.layers(x)
        return x - noise


def _conv3x3(in_width: int, width: int, *, bias: bool = False) -> nn.Conv2d:
    conv = nn.Conv2d(in_width, width, kernel_size=3, padding=1, bias=bias)
    nn.init.orthogonal_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
