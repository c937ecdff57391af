"""Checks of the numbers that a black box is set up with."""

import math

from deepzero_core.errors import RequestError


def count(name: str, value: int | None, *, least: int = 1) -> int | None:
    """A whole number of at least `least`, or None. Raises RequestError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value


def positive(name: str, value: float) -> float:
    """A finite number above zero. Raises RequestError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise RequestError(f"{name} must be a number above 0, not {value!r}")
    return float(value)
