"""Combinations of a defence that cannot run; see `configs.checks`."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

from configs.checks import Problem, certification, cluster, comparison, data_set, network
from configs.clusters import FILES
from configs.defence import WHITE_BOX, VictimConfig
from configs.facts import BLACK_BOXES
from deepzero_core.errors import suggest

if TYPE_CHECKING:
    from configs.defence import Defence

DENOISERS = ("autoencoder", "dncnn", "unet")
_OWN_ONLY = ("settings", "batch_size", "cache", "budget", "images_per_second", "calls_per_second", "price_per_thousand")


def _victim(defence: "Defence") -> Iterator[Problem]:
    victim = defence.victim
    if victim.kind == "trained":
        for key in _OWN_ONLY:
            if getattr(victim, key) != VictimConfig.model_fields[key].get_default(call_default_factory=True):
                yield f"victim.{key}", "it is for a classifier of your own, but victim.kind is 'trained': set the kind"
        if victim.answers != "logits":
            yield "victim.answers", "a classifier that is trained here answers logits"
        for key, reason in network(victim.model, defence.data):
            yield f"victim.model.{key}", reason
        return
    needed, optional = BLACK_BOXES[victim.kind]
    for key in victim.settings:
        if key not in (needed, *optional):
            where = f"it is victim.{_HERE[key]}" if key in _HERE else suggest(key, (needed, *optional))
            yield f"victim.settings.{key}", f"a classifier of kind {victim.kind!r} has no such setting; {where}"
    address = _address(victim.settings)
    if address is not None and "@" in address.netloc:
        yield "victim.settings.url", "a password does not belong into an address: name token_env or token_file"
    yield from _secrets(victim.settings)
    if needed not in victim.settings:
        yield f"victim.settings.{needed}", f"a classifier of kind {victim.kind!r} needs it"


def _secrets(settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings are shown: in the resolved configuration, in MLflow and in Prefect. A secret is only named there."""
    headers = settings.get("headers")
    address = _address(settings)
    named = {
        "url": [] if address is None else [key for key, _ in parse_qsl(address.query, keep_blank_values=True)],
        "headers": list(headers) if isinstance(headers, dict) else [],
    }
    for where, names in named.items():
        for name in names:
            if _SECRET.search(str(name)):
                yield (
                    f"victim.settings.{where}",
                    f"{name!r} looks like a secret, and settings are shown in MLflow and Prefect: "
                    "name token_env or token_file, and token_header where it is not Authorization",
                )


def _address(settings: Mapping[str, Any]) -> SplitResult | None:
    """None where it cannot be read; the adapter says so."""
    try:
        return urlsplit(str(settings.get("url", "")))
    except ValueError:
        return None


_SECRET = re.compile(r"key|token|secret|passw|auth|signature|credential|cookie|^sig$", re.IGNORECASE)

_HERE = {
    "answers": "answers",
    "batch_size": "batch_size",
    "budget": "budget",
    "examples_per_second": "images_per_second",
    "calls_per_second": "calls_per_second",
    "price_per_thousand": "price_per_thousand",
}
"""Settings of the adapters that have a key of their own, and that key."""


def _methods(defence: "Defence") -> Iterator[Problem]:
    own = [("training.method", defence.training.method)]
    for key, method in [*own, *((f"baselines.{i}", method) for i, method in enumerate(defence.baselines))]:
        if method == "fo-ds" and defence.victim.kind not in WHITE_BOX:
            yield key, f"'fo-ds' differentiates the classifier, and one of kind {defence.victim.kind!r} is a black box"


def _images(defence: "Defence") -> Iterator[Problem]:
    # The classifier's labels are asked for once, of the images as they are.
    if defence.data.crop_padding or defence.data.flip:
        key = "crop_padding" if defence.data.crop_padding else "flip"
        yield f"data.{key}", "the classifier's labels belong to the images as they are: a defence does not change them"
    if ":" not in defence.denoiser.name and defence.denoiser.name not in DENOISERS:
        hint = suggest(defence.denoiser.name, DENOISERS)
        yield "denoiser.name", f"there is no denoiser {defence.denoiser.name!r}; {hint}"
    if ":" not in defence.denoiser.name and defence.denoiser.arguments:
        yield "denoiser.arguments", f"{defence.denoiser.name!r} takes none; they are for your own callable"


def _countable(defence: "Defence") -> Iterator[Problem]:
    kind = FILES.get(str(defence.cluster.spec))
    if kind in ("slurm", "kubernetes") and defence.victim.kind != "trained":
        yield (
            "cluster.spec",
            f"what a classifier of kind {defence.victim.kind!r} is asked is counted on this machine: certify it with "
            "workers of this machine, cluster.spec=local",
        )


CHECKS: tuple[Callable[["Defence"], Iterator[Problem]], ...] = (
    data_set,
    _victim,
    _methods,
    _images,
    comparison,
    certification,
    cluster,
    _countable,
)
