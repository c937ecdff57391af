"""A callable from its name 'package.module:callable', as configurations give it."""

import importlib
from collections.abc import Callable

from deepzero_core.errors import RequestError, suggest


def resolve(name: str, *, what: str) -> Callable[..., object]:
    """The callable called `name`; `what` it is meant to be ("model", …) begins the sentence where it is not found.

    Raises:
        RequestError: a name of another form, one that cannot be imported, or of something that is not callable.
    """
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise RequestError(f"{what} {name!r} must have the form 'package.module:callable'")
    try:
        found: object = importlib.import_module(path)
    except Exception as error:
        raise RequestError(
            f"{what} {name!r}: {path!r} cannot be imported ({reason(error)}); it must be installed or on PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = (candidate for candidate in dir(found) if not candidate.startswith("_"))
            raise RequestError(f"{what} {name!r}: {path!r} has no {part!r}; {suggest(part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise RequestError(f"{what} {name!r} must name a callable, but names a {type(found).__name__}")
    return found


def reason(error: BaseException) -> str:
    """The error as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
