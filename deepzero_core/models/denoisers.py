"""A denoiser from its name in the configuration."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from deepzero_core.errors import RequestError, suggest
from deepzero_core.models.autoencoder import Autoencoder
from deepzero_core.models.custom import call, check_shape, seeded
from deepzero_core.models.dncnn import DnCNN
from deepzero_core.models.unet import UNet

DENOISERS = ("autoencoder", "dncnn", "unet")


def build_denoiser(
    name: str,
    *,
    channels: int,
    image_size: int | tuple[int, int],
    depth: int | None = None,
    width: int | None = None,
    latent: int = 1152,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """The network [B, C, H, W] → [B, C, H, W] called `name`, in training mode, its weights a function of `seed` alone.

    name: "dncnn" (depth 17 and width 64 unless said otherwise), "unet" (2 and 16), "autoencoder" (width 32, of `latent`
    numbers per image, with `.encoder` and `.decoder`; its depth follows from the image), or
    "package.module:callable", called as callable(**arguments) and tried once in evaluation mode.
    image_size: side of the square image, or (H, W), pixels.
    The global random state is the same before and after.

    RequestError: unknown name, impossible size, depth or width, a callable that cannot be imported or called, or whose
    module does not return images of the shape it was given.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    for key, value in (("channels", channels), ("image_size", min(size))):
        if value < 1:
            raise RequestError(f"{key} must be at least 1, but is {value}")
    if ":" in name:
        with seeded(seed):
            module = call(name, arguments or {})
            check_shape(name, module, (channels, *size), (channels, *size), "images")
        return module
    if name not in DENOISERS:
        raise RequestError(
            f"there is no denoiser {name!r}: {suggest(name, DENOISERS)} (your own is named 'package.module:callable')"
        )
    if arguments:
        raise RequestError(
            f"denoiser {name!r} takes no arguments, but was given {', '.join(map(repr, arguments))}; "
            "arguments are for denoisers named 'package.module:callable'"
        )
    chosen = {key: value for key, value in (("depth", depth), ("width", width)) if value is not None}
    with seeded(seed):
        if name == "dncnn":
            return DnCNN(channels, **chosen)
        if name == "unet":
            return UNet(channels, **chosen)
        chosen.pop("depth", None)
        return Autoencoder(channels, size, latent=latent, **chosen)
