"""How fast a black box may be asked."""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from deepzero_core.oracle.settings import positive


class Bookings(Protocol):
    """Where it is kept until when a pace is taken; whoever shares it shares the pace."""

    def book(self, pace: str, seconds: float) -> float:
        """Take the next `seconds` of a pace that nobody has taken; how many seconds from now they begin."""
        ...


def next_free(now: float, booked_at: float, free_at: float) -> float:
    """When the next booking begins; the last one, which ends at `free_at`, was made at `booked_at`.

    A clock that was set back since then takes what was booked with it.
    """
    return max(now, free_at - max(0.0, booked_at - now))


class MemoryBookings:
    """Bookings of the threads of this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._free_at: dict[str, float] = {}

    def book(self, pace: str, seconds: float) -> float:
        """See `Bookings.book`."""
        with self._lock:
            now = self._clock()
            begins = next_free(now, now, self._free_at.get(pace, now))
            self._free_at[pace] = begins + seconds
            return begins - now

    def __getstate__(self) -> dict[str, Any]:
        return {"_clock": self._clock}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


class Pace:
    """At most `per_second` units a second: what is taken now has to have passed before the next may be taken.

    There is no credit for having been idle, so that no second ever sees more than the rate and one call. It holds for
    all who share the bookings.
    """

    def __init__(
        self,
        name: str,
        per_second: float,
        bookings: Bookings,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name, self.per_second = name, positive(name, per_second)
        self._bookings, self._sleep = bookings, sleep

    def wait(self, units: int) -> None:
        """Take `units` more, and sleep until they may be used."""
        seconds = self._bookings.book(self.name, units / self.per_second)
        if seconds > 0:
            self._sleep(seconds)
