"""Whether the MLflow store answers, known to the whole process: a store that is away is asked again, but seldom.

An attempt at a store that has just failed would cost every run of the process its time-out again. After a failure
nobody tries for a while (5 s, doubled up to 30 s), and then a probe of two seconds goes first.
"""

import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

_log = logging.getLogger(__name__)

REMOTE = ("http://", "https://")
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
PROBE_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 30.0

# MLflow itself would try a request for minutes, and a training with it: what is not taken at once waits in the spool.
# Read by MLflow at every request.
_MLFLOW = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def configure() -> None:
    """Short patience in MLflow's own client; what the user has set stays."""
    for name, value in _MLFLOW.items():
        os.environ.setdefault(name, value)


@dataclass
class Gate:
    """Shut after a failure, opened by a success; `clock` in seconds."""

    uri: str
    clock: Callable[[], float] = time.monotonic
    why: str = ""
    """Of the last failure."""
    _failures: int = 0
    _again: float = 0.0
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def ask_now(self) -> bool:
        """As `passable`, without waiting for the pause to end."""
        with self._turn:
            self._again = self.clock()
        return self.passable()

    def passable(self) -> bool:
        """Whether an attempt is worth its time."""
        with self._turn:
            if not self._failures:
                return True
            if self.clock() < self._again:
                return False
            if answers(self.uri):
                return True
            self.why = f"it does not say within {PROBE_S:g} s that it is well"
            self._shut()
            return False

    def failed(self, why: str) -> None:
        """An attempt has failed: told once for every time that the store goes away."""
        with self._turn:
            self.why = why
            if not self._failures:
                _log.warning("MLflow does not answer (%s): the run goes on, and what it has to tell waits on disk", why)
            self._shut()

    def succeeded(self) -> None:
        with self._turn:
            if self._failures:
                _log.warning("MLflow answers again, and has been told what it missed")
            self._failures = 0

    def _shut(self) -> None:
        self._again = self.clock() + min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures, 6))
        self._failures += 1


@functools.cache
def gate(uri: str) -> Gate:
    """The gate of a store."""
    return Gate(uri)


def answers(uri: str) -> bool:
    """Whether a server says within two seconds that it is well, or a database's host listens; files always are."""
    if uri.startswith(REMOTE):
        try:
            # Any answer is one: proxies in front of MLflow need not let this page through.
            return httpx.get(uri.rstrip("/") + "/health", timeout=PROBE_S).status_code < 500
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            return False
    try:
        knock(uri, PROBE_S)
    except OSError:
        return False
    return True


def knock(uri: str, timeout_s: float) -> None:
    """OSError at once where nobody listens at the address of a server; MLflow would try for minutes. Files always are.

    The error does not hold a piece of the address, which may be one of a password.
    """
    try:
        address = urlsplit(uri)
        host, port = address.hostname, address.port or _PORTS.get(address.scheme.partition("+")[0])
    except ValueError:
        raise OSError("this is no address that can be read") from None
    if host and port:
        socket.create_connection((host, port), timeout=timeout_s).close()
