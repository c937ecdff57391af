"""What has been asked of a black box, and what that may not exceed."""

import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from os import PathLike
from typing import Any, Protocol

from deepzero_core.oracle.database import Database
from deepzero_core.oracle.protocol import QueryBudgetError
from deepzero_core.oracle.rate import Bookings, MemoryBookings, next_free


@dataclass(frozen=True)
class Usage:
    """Counts, which add up.

    examples: sent; an example sent again after a fault counts once.
    calls:    of the box.
    cached:   examples that the cache answered; they are not among `examples`.
    retries:  how often a call was sent again.
    seconds:  spent waiting for answers, retries included.
    """

    examples: int = 0
    calls: int = 0
    cached: int = 0
    retries: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


class Account(Bookings, Protocol):
    """Where the counts of a black box are kept, and how fast it may be asked: whoever shares it shares both."""

    @property
    def usage(self) -> Usage: ...

    def add(self, usage: Usage, *, budget: int | None = None) -> None:
        """Add counts, negative ones too; QueryBudgetError, and nothing added, where examples would exceed `budget`."""
        ...

    def close(self) -> None: ...


class MemoryAccount:
    """Counts of this process, from `usage` on."""

    def __init__(self, usage: Usage | None = None) -> None:
        self.usage = usage or Usage()
        self._bookings = MemoryBookings()
        self._lock = threading.Lock()

    def add(self, usage: Usage, *, budget: int | None = None) -> None:
        """See `Account.add`."""
        with self._lock:
            total = self.usage + usage
            refuse_over(budget, self.usage.examples, usage.examples)
            self.usage = total

    def book(self, pace: str, seconds: float) -> float:
        """See `Bookings.book`."""
        return self._bookings.book(pace, seconds)

    def close(self) -> None:
        """Nothing is held open."""

    def __getstate__(self) -> dict[str, Any]:
        return {"usage": self.usage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        MemoryAccount.__init__(self, state["usage"])


_COLUMNS = [f.name for f in fields(Usage)]
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS accounts (name TEXT PRIMARY KEY, examples INTEGER NOT NULL, calls INTEGER NOT NULL, "
    "cached INTEGER NOT NULL, retries INTEGER NOT NULL, seconds REAL NOT NULL)",
    "CREATE TABLE IF NOT EXISTS paces (account TEXT NOT NULL, pace TEXT NOT NULL, booked_at REAL NOT NULL, "
    "free_at REAL NOT NULL, PRIMARY KEY (account, pace))",
)


class StoredAccount:
    """Counts in a SQLite file: a budget that holds for several processes together and outlives a killed one.

    An example is on the account before it is sent, so that what was spent is never forgotten. Paces are kept beside the
    counts: the processes together are as fast as one alone may be.

    Args:
        path: the file, made where it is not there; any number of accounts may be in it.
        name: the account, e.g. of one run.
        clock: the time of day, by which the processes agree.

    Raises:
        RequestError: a place that cannot be written to, a file of something else, or a damaged one.
    """

    def __init__(self, path: str | PathLike[str], name: str, *, clock: Callable[[], float] = time.time) -> None:
        self.name, self._clock = name, clock
        self._database = Database(
            path, schema=_SCHEMA, application_id=0x447A4163, what="query account", replaceable=False
        )
        self._database.run(self._read)

    @property
    def usage(self) -> Usage:
        """The counts so far, of all processes."""
        return self._database.run(self._read)

    def add(self, usage: Usage, *, budget: int | None = None) -> None:
        """See `Account.add`."""

        def write(connection: sqlite3.Connection) -> None:
            before = self._read(connection)
            refuse_over(budget, before.examples, usage.examples)
            marks = ", ".join("?" * (1 + len(_COLUMNS)))
            connection.execute(
                f"INSERT OR REPLACE INTO accounts VALUES ({marks})", (self.name, *astuple(before + usage))
            )

        self._database.run(write)

    def book(self, pace: str, seconds: float) -> float:
        """See `Bookings.book`."""

        def write(connection: sqlite3.Connection) -> float:
            now = self._clock()
            last = connection.execute(
                "SELECT booked_at, free_at FROM paces WHERE account = ? AND pace = ?", (self.name, pace)
            ).fetchone()
            begins = next_free(now, *(last or (now, now)))
            row = (self.name, pace, now, begins + seconds)
            connection.execute("INSERT OR REPLACE INTO paces VALUES (?, ?, ?, ?)", row)
            return begins - now

        return self._database.run(write)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._database.close()

    def _read(self, connection: sqlite3.Connection) -> Usage:
        found = connection.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM accounts WHERE name = ?", (self.name,)
        ).fetchone()
        return Usage(*found) if found else Usage()


def refuse_over(budget: int | None, spent: int, examples: int) -> None:
    """Raise QueryBudgetError where `examples` more would be more than the budget."""
    if budget is not None and examples > 0 and spent + examples > budget:
        raise QueryBudgetError(
            f"a question of {examples} examples is more than is left of the query budget: {spent} of {budget} are spent"
        )
