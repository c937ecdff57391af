"""A network from its name in the configuration."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from deepzero_core.callables import reason, resolve
from deepzero_core.errors import RequestError, suggest
from deepzero_core.models.cnn import CNN
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
        with _seeded(seed):
            module = _call(name, dict(arguments or {}))
            _try(name, module, in_channels, num_classes, size)
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
    with _seeded(seed):
        if name == "cnn":
            return CNN(in_channels, num_classes, size, depth=depth, width=width)
        return ResNet(int(name.removeprefix("resnet")), in_channels, num_classes)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # torch's layers draw their weights from the global generator: it is lent for the time of building.
    # torch.manual_seed would also leave a seed behind for a CUDA runtime that is not yet started.
    started = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if started else ()):
        torch.default_generator.manual_seed(seed)
        if started:
            torch.cuda.manual_seed_all(seed)
        yield


def _call(name: str, arguments: dict[str, Any]) -> nn.Module:
    factory = resolve(name, what="model")
    try:
        module = factory(**arguments)
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise RequestError(f"model {name!r} called with ({shown}) failed: {reason(error)}") from error
    if not isinstance(module, nn.Module):
        raise RequestError(f"model {name!r} must return a torch.nn.Module, but returned {type(module).__name__}")
    return module


def _try(name: str, module: nn.Module, in_channels: int, num_classes: int, size: tuple[int, int]) -> None:
    """One forward pass of two blank images, so that a misfit is found before anything is trained."""
    parameter = next(module.parameters(), None)
    # A lazy parameter has no dtype worth asking for; the blank pass is what gives it its shape.
    images = torch.zeros(2, in_channels, *size, device=None if parameter is None else parameter.device)
    modes = {child: child.training for child in module.modules()}
    module.eval()  # running statistics stay as they are
    try:
        with torch.no_grad():
            scores = module(images)
    except Exception as error:
        raise RequestError(
            f"model {name!r} cannot take images of shape {list(images.shape)}: {reason(error)}"
        ) from error
    finally:
        for child, training in modes.items():
            child.training = training
    expected = (2, num_classes)
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != expected:
        got = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise RequestError(
            f"model {name!r} must turn images of shape {list(images.shape)} into scores of shape {list(expected)}, "
            f"but returned {got}"
        )
