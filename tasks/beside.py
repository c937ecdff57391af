"""Work beside a stage's own, for which no step waits: what servers are told in its middle. One thread, in order."""

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_THREAD = ThreadPoolExecutor(1, "beside")


def beside(work: Callable[[], T]) -> "Future[T]":
    """Have it done in the context of the caller, after what was asked for before."""
    return _THREAD.submit(contextvars.copy_context().run, work)
