"""A black box from plain settings, as a configuration holds them."""

import inspect
from collections.abc import Callable
from os import PathLike
from typing import Any

from deepzero_core.errors import RequestError, suggest
from deepzero_core.oracle.account import Account, StoredAccount
from deepzero_core.oracle.cache import ResponseCache
from deepzero_core.oracle.function import FunctionOracle
from deepzero_core.oracle.http import HttpOracle
from deepzero_core.oracle.metered import Metered
from deepzero_core.oracle.module import ModuleOracle
from deepzero_core.oracle.onnx import OnnxOracle
from deepzero_core.oracle.protocol import Oracle

_KINDS: dict[str, tuple[Callable[..., Oracle], Callable[..., Oracle]]] = {
    # What makes it, and what names its settings.
    "module": (ModuleOracle, ModuleOracle),
    "function": (FunctionOracle, FunctionOracle),
    "onnx": (OnnxOracle, OnnxOracle),
    "http": (HttpOracle, HttpOracle),
    "mlflow": (HttpOracle.mlflow, HttpOracle),
}
KINDS = tuple(_KINDS)
_METER = ("budget", "classes", "examples_per_second", "calls_per_second", "price_per_thousand")


def open_oracle(
    kind: str,
    *,
    cache: str | PathLike[str] | ResponseCache | None = None,
    account: tuple[str | PathLike[str], str] | Account | None = None,
    **settings: Any,
) -> Metered:
    """The black box of a kind: "module", "function", "onnx", "http" or "mlflow".

    kind:     which adapter; `settings_of(kind)` names its settings.
    cache:    the file of its response cache; None: none.
    account:  (file, name) of the account that its budget is kept on; None: this process alone.
    settings: those of the adapter and those of `Metered`.

    Raises:
        RequestError: an unknown kind or setting, a missing one, or a value that cannot be used.
    """
    if kind not in _KINDS:
        raise RequestError(f"there is no black box of kind {kind!r}: {suggest(str(kind), KINDS)}")
    known = settings_of(kind)
    for key in settings:
        if key not in known:
            raise RequestError(f"a black box of kind {kind!r} has no setting {key!r}: {suggest(key, known)}")
    missing = [key for key, needed in known.items() if needed and key not in settings]
    if missing:
        raise RequestError(f"a black box of kind {kind!r} needs the setting {missing[0]!r}")
    oracle = _KINDS[kind][0](**{key: value for key, value in settings.items() if key not in _METER})
    meter = {key: value for key, value in settings.items() if key in _METER}
    if cache is not None:
        _ = oracle.identity  # where it has none, no file is made either
    kept = ResponseCache(cache) if isinstance(cache, str | PathLike) else cache
    return Metered(
        oracle, cache=kept, account=StoredAccount(*account) if isinstance(account, tuple) else account, **meter
    )


def settings_of(kind: str) -> dict[str, bool]:
    """The settings of a kind by name; True: it has to be given."""
    parameters = inspect.signature(_KINDS[kind][1]).parameters.values()
    own = {parameter.name: parameter.default is parameter.empty for parameter in parameters}
    return {**own, **dict.fromkeys(_METER, False)}
