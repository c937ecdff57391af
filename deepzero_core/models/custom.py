"""Networks that the user names as package.module:callable, and what every built network has to show."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from deepzero_core.callables import reason, resolve
from deepzero_core.errors import RequestError


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lend torch's global generators, seeded, and leave them as they were."""
    # torch's layers draw their weights from the global generator: it is lent for the time of building.
    # torch.manual_seed would also leave a seed behind for a CUDA runtime that is not yet started.
    started = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if started else ()):
        torch.default_generator.manual_seed(seed)
        if started:
            torch.cuda.manual_seed_all(seed)
        yield


def call(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The module that `package.module:callable` returns; RequestError: it cannot be imported or called, or is none."""
    factory = resolve(name, what="model")
    try:
        module = factory(**arguments)
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise RequestError(f"model {name!r} called with ({shown}) failed: {reason(error)}") from error
    if not isinstance(module, nn.Module):
        raise RequestError(f"model {name!r} must return a torch.nn.Module, but returned {type(module).__name__}")
    return module


def check_shape(name: str, module: nn.Module, image: tuple[int, int, int], answer: tuple[int, ...], what: str) -> None:
    """One forward pass of two blank images [2, C, H, W], so that a misfit is found before anything is trained.

    answer: shape of what one image has to become; what: its name in the message.
    RequestError: the module cannot take the images, or turns them into something else.
    """
    parameter = next(module.parameters(), None)
    # A lazy parameter has no dtype worth asking for; the blank pass is what gives it its shape.
    images = torch.zeros(2, *image, device=None if parameter is None else parameter.device)
    modes = {child: child.training for child in module.modules()}
    module.eval()  # running statistics stay as they are
    try:
        with torch.no_grad():
            found = module(images)
    except Exception as error:
        raise RequestError(
            f"model {name!r} cannot take images of shape {list(images.shape)}: {reason(error)}"
        ) from error
    finally:
        for child, training in modes.items():
            child.training = training
    expected = (2, *answer)
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != expected:
        got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise RequestError(
            f"model {name!r} must turn images of shape {list(images.shape)} into {what} of shape {list(expected)}, "
            f"but returned {got}"
        )
