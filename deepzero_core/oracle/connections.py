"""Several connections to one address, each for one request at a time."""

import queue
from collections.abc import Callable
from typing import Any

from deepzero_core.oracle.transport import Transport


class Connections:
    """`count` transports as `make` makes them. A request takes one that is free, and waits where none is."""

    def __init__(self, count: int, make: Callable[[], Transport]) -> None:
        self._all = [make() for _ in range(count)]
        self._begin()

    def _begin(self) -> None:
        # The last one that was used first: where one is enough, no other is opened.
        self._free: queue.LifoQueue[Transport] = queue.LifoQueue()
        for transport in reversed(self._all):
            self._free.put(transport)

    @property
    def retries(self) -> int:
        """How often requests have been sent again so far."""
        return sum(transport.retries for transport in self._all)

    def send(self, body: bytes) -> bytes:
        """See `Transport.send`."""
        transport = self._free.get()
        try:
            return transport.send(body)
        finally:
            self._free.put(transport)

    def shows_token(self, body: bytes) -> bool:
        """See `Transport.shows_token`."""
        return self._all[0].shows_token(body)

    def close(self) -> None:
        """Close them; the next request opens one again."""
        for transport in self._all:
            transport.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_all": self._all}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._all = state["_all"]
        self._begin()
