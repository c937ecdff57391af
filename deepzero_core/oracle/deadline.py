"""A time-out for a whole request: httpx limits each wait for bytes, and a server may send one byte a second."""

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any


class Deadline:
    """Cuts the connection of a client with one connection when its request takes too long."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._expired = threading.Event()

    @contextmanager
    def within(self, seconds: float) -> Iterator[threading.Event]:
        """What is sent in the block has so many seconds; the event says that they were not enough."""
        expired = self._expired = threading.Event()

        def cut() -> None:
            expired.set()
            self._shut()

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield expired
        finally:
            timer.cancel()
            timer.join()

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """For the request's extension "trace": learns which socket it is."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._expired.is_set():
                self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
