"""A network from its name in the configuration."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from deepzero_core.errors import RequestError, suggest
from deepzero_core.models.cnn import CNN
from deepzero_core.models.custom import call, check_shape, seeded
from deepzero_core.models.resnet import RESNET_DEPTHS, ResNet

BUILT_IN = ("cnn", *(f"resnet{depth}" for depth in RESNET_DEPTHS))


def build_model(
    name: str,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int | tuple[int, int],
    depth: int = 2,
    width: int = 18,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """The network called `name`, in training mode, its weights a function of `seed` alone.

    name: "cnn" (of `depth` and `width`), "resnet20", "resnet32", "resnet44", "resnet56" (`depth` and `width` are
    theirs and not read), or "package.module:callable", called as callable(**arguments); what it returns must turn
    [B, in_channels, H, W] into [B, num_classes], which is tried once, in evaluation mode.
    image_size: side of the square image, or (H, W), pixels.
    The global random state is the same before and after.

    RequestError: unknown name, impossible size or depth, a callable that cannot be imported or called, or whose
    module does not fit the data.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    for key, value in (("in_channels", in_channels), ("num_classes", num_classes), ("image_size", min(size))):
        if value < 1:
            raise RequestError(f"{key} must be at least 1, but is {value}")
    if ":" in name:
        with seeded(seed):
            module = call(name, arguments or {})
            check_shape(name, module, (in_channels, *size), (num_classes,), "scores")
        return module
    if name not in BUILT_IN:
        raise RequestError(
            f"there is no model {name!r}: {suggest(name, BUILT_IN)} (your own is named 'package.module:callable')"
        )
    if arguments:
        raise RequestError(
            f"model {name!r} takes no arguments, but was given {', '.join(map(repr, arguments))}; "
            "arguments are for models named 'package.module:callable'"
        )
    with seeded(seed):
        if name == "cnn":
            return CNN(in_channels, num_classes, size, depth=depth, width=width)
        return ResNet(int(name.removeprefix("resnet")), in_channels, num_classes)
