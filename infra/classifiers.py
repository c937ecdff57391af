"""A classifier described so that any process can build it for itself.

Workers of a cluster get names and plain values and never code: a recipe names a callable of an installed package, and
its arguments are what JSON has. Weights are files, read as tensors alone.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepzero_core.errors import RequestError
from deepzero_core.models import Normalised, build_model
from deepzero_core.smoothing import Inference

Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """`factory`, "package.module:callable", called as callable(example, **arguments), gives the classifier.

    example: the first image that will be classified, [C, H, W]. RequestError: arguments that are not JSON, a factory
    that is not there.
    """

    factory: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            json.dumps(dict(self.arguments), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RequestError(f"arguments of {self.factory} must be plain values, as JSON has them: {error}") from None

    def build(self, example: Tensor) -> Classifier:
        """The classifier, built in this process."""
        module, _, name = self.factory.partition(":")
        try:
            factory = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise RequestError(f"{self.factory!r} does not name a callable package.module:callable: {error}") from error
        classifier: Classifier = factory(example, **self.arguments)
        return classifier


def trained(
    example: Tensor, *, model: Mapping[str, Any], weights: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> Inference:
    """A network of `build_model` with weights from a file, for images in [0, 1]: σ is in their units."""
    module = build_model(**model)
    module.load_state_dict(torch.load(Path(weights), weights_only=True))
    return Inference(Normalised(module, mean, std), example)
