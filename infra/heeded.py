"""A request to stop that Python would lose.

A signal handler that raises does so wherever the process happens to be. In a destructor or in a callback of the garbage
collector (Dask has one) Python drops the exception, and with it the request: the run would go on until it is killed.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefect.exceptions import TerminationSignal

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

REQUESTS = (KeyboardInterrupt, SystemExit, TerminationSignal)
_AGAIN_AFTER_S = 0.1


@contextmanager
def heeded() -> Iterator[None]:
    """Within, a signal whose exception was dropped comes again, by which time the process will be elsewhere."""
    before = sys.unraisablehook

    def dropped(unraisable: "UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not isinstance(error, REQUESTS):
            before(unraisable)
            return
        number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        threading.Timer(_AGAIN_AFTER_S, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before
