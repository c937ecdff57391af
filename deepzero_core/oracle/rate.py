"""How fast a black box may be asked."""

import time
from collections.abc import Callable

from deepzero_core.oracle.settings import positive


class Pace:
    """At most `per_second` units a second: what is taken now has to have passed before the next may be taken.

    There is no credit for having been idle, so that no second ever sees more than the rate and one call. It holds for
    this process alone.
    """

    def __init__(
        self,
        name: str,
        per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.per_second = positive(name, per_second)
        self._clock, self._sleep = clock, sleep
        self._free_at = float("-inf")

    def wait(self, units: int) -> None:
        """Sleep until `units` more may be taken, and take them."""
        now = self._clock()
        if self._free_at > now:
            self._sleep(self._free_at - now)
        self._free_at = max(self._free_at, now) + units / self.per_second
