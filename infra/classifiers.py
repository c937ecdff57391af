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
from torch import Tensor, nn

from deepzero_core.errors import RequestError
from deepzero_core.models import build_denoiser
from deepzero_core.oracle import logits
from deepzero_core.smoothing import Inference
from infra.victims import open_victim, trained_network

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


def files_of(recipe: Recipe) -> list[str]:
    """Paths of the files that it reads.

    RequestError: it keeps a count or a cache of its questions in a file, which processes of one machine alone share.
    """
    victim = recipe.arguments.get("victim") or {}
    if victim.get("kind", "trained") != "trained" and (victim.get("account") or victim.get("cache")):
        raise RequestError(
            "what a classifier is asked that can only be queried is counted in a file of this machine: certify it with "
            "workers of this machine, without cluster.address and with cluster.spec=local"
        )
    places = (recipe.arguments, victim, victim.get("settings") or {})
    return [str(place[key]) for place in places for key in ("weights", "path") if place.get(key) is not None]


def moved(recipe: Recipe, places: Mapping[str, str]) -> Recipe:
    """The same recipe where files lie elsewhere: new paths by old."""

    def renamed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: renamed(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [renamed(part) for part in value]
        return places.get(value, value) if isinstance(value, str) else value

    return Recipe(recipe.factory, renamed(recipe.arguments))


def trained(
    example: Tensor, *, model: Mapping[str, Any], weights: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> Inference:
    """A network of `build_model` with weights from a file, for images in [0, 1]: σ is in their units."""
    return Inference(trained_network({"model": model, "weights": weights, "mean": mean, "std": std}), example)


def defended(
    example: Tensor, *, victim: Mapping[str, Any], purifier: Mapping[str, Any] | None, weights: str | None
) -> Classifier:
    """x ↦ f(D(x)): a classifier that is only queried, and the network that images go through before it sees them.

    victim: see `infra.victims`. purifier, weights: see `purifier_of`; None: the classifier as it is.
    """
    network = None if purifier is None or weights is None else purifier_of(purifier, weights)
    if victim["kind"] == "trained":
        classifier = trained_network(victim)
        return Inference(classifier if network is None else nn.Sequential(network, classifier), example)
    box = open_victim(victim)
    if network is None:
        return lambda images: logits(box, images)
    purify = Inference(network, example)
    return lambda images: logits(box, purify(images))


def purifier_of(purifier: Mapping[str, Any], weights: str) -> nn.Module:
    """The network in front of a classifier, [N, C, H, W] → the same, in evaluation mode.

    purifier: {"denoiser": arguments of `build_denoiser`, "autoencoder": the same or None}; an autoencoder comes behind.
    """
    network = purifying(purifier)
    network.load_state_dict(torch.load(Path(weights), weights_only=True))
    return network.eval()


def purifying(purifier: Mapping[str, Any]) -> nn.Sequential:
    """The same, its weights as they are built."""
    parts = [build_denoiser(**purifier[name]) for name in ("denoiser", "autoencoder") if purifier[name] is not None]
    return nn.Sequential(*parts)
