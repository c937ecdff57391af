"""The two ways in which a run ends badly, and how a mistyped name is answered."""

import difflib
from collections.abc import Iterable


class DeepZeroError(Exception):
    """Base of every error whose message is meant for the user; shown without a traceback."""

    exit_code = 1


class RequestError(DeepZeroError):
    """The request was wrong: configuration, data or arguments. Exit code 2."""

    exit_code = 2


class WorkError(DeepZeroError):
    """The request was right and the work failed. Exit code 1."""


class LostError(WorkError):
    """Something that the work asks is gone. What runs stops where it stands, and can go on from there later."""


class BlackBoxError(LostError):
    """A black box cannot be asked any further."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of an error sentence: the nearest valid name, or all of them when none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"valid are: {', '.join(names)}" if names else "none is available"
