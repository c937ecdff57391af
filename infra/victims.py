"""The classifier that a defence stands in front of, opened from plain values by whoever needs it: here or on a worker.

kind "trained": {"model": arguments of `build_model`, "weights": file, "mean", "std"}, a network of this project
other kinds:    {"settings": of the adapter and of `Metered`, "cache": file or None}
all:            {"account": [file, name] or None}, where the images that it is asked about are counted
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepzero_core.callables import resolve
from deepzero_core.errors import RequestError
from deepzero_core.models import Normalised, build_model
from deepzero_core.oracle import Metered, ModuleOracle, StoredAccount, open_oracle

_AT_ONCE = 1024
"""Images of one question to a network of this project: larger ones leave the caches."""


def open_victim(description: Mapping[str, Any]) -> Metered:
    """The classifier as a black box: images [N, C, H, W] in [0, 1] → [N, K].

    Raises:
        RequestError: it cannot be opened as it is described.
    """
    if description["kind"] == "trained":
        oracle = ModuleOracle(trained_network(description), batch_size=_AT_ONCE, name="classifier")
        return Metered(oracle, account=_account(description))
    return open_oracle(
        description["kind"],
        cache=description["cache"],
        account=_account(description),
        **description["settings"],
    )


def white_box(description: Mapping[str, Any]) -> nn.Module:
    """The same classifier as a module in evaluation mode, images in [0, 1] → logits: what no defence may look into.

    Raises:
        RequestError: it is not a network of torch.
    """
    if description["kind"] == "trained":
        return trained_network(description)
    if description["kind"] != "module":
        raise RequestError(f"a classifier of kind {description['kind']!r} cannot be differentiated")
    module = resolve(description["settings"]["module"], what="classifier")()
    if not isinstance(module, nn.Module):
        raise RequestError(f"a classifier of kind 'module' is a torch.nn.Module, not a {type(module).__name__}")
    return module.eval()


def trained_network(description: Mapping[str, Any]) -> Normalised:
    """A network of `build_model` with weights from a file, for images in [0, 1], in evaluation mode."""
    module = build_model(**description["model"])
    module.load_state_dict(torch.load(Path(description["weights"]), weights_only=True))
    return Normalised(module, description["mean"], description["std"]).eval()


def _account(description: Mapping[str, Any]) -> StoredAccount | None:
    return None if description["account"] is None else StoredAccount(*description["account"])
