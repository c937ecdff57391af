"""A SQLite file that several processes share and that outlives each of them, also one that is killed.

Write-ahead logging: what was committed is there whatever happens to the process; a power cut may take the last
moments, never the file. The file has to lie on a disk of this machine, SQLite's locks do not reach across a network.
"""

import os
import sqlite3
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from deepzero_core.errors import RequestError, WorkError

T = TypeVar("T")

_BUSY_S = 60.0
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Database:
    """One file and its tables; connections are opened when needed, one for each process.

    Args:
        path: the file, made with its folder where it is not there.
        schema: statements that make the tables.
        application_id: 32 bits that mark a file as one of this kind.
        what: what messages call it.
        replaceable: whether a damaged file may be set aside and begun anew, with a warning; else it is an error.
    """

    def __init__(
        self, path: str | PathLike[str], *, schema: tuple[str, ...], application_id: int, what: str, replaceable: bool
    ) -> None:
        self.path = Path(path).expanduser().absolute()
        self._schema, self._application_id = schema, application_id
        self._what, self._replaceable = what, replaceable
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        self._inode: int | None = None

    def run(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """What `operation` returns, done in one transaction: completely or not at all.

        Raises:
            RequestError: the file is of another kind, cannot be opened or is damaged.
            WorkError: it could not be read or written: disk full, locked for a minute.
        """
        with self._lock:
            try:
                return self._transaction(operation)
            except sqlite3.DatabaseError as error:
                if not _damaged(error):
                    raise WorkError(f"the {self._what} {self.path} failed: {error}") from error
                self._set_aside(error)
            try:
                return self._transaction(operation)
            except sqlite3.DatabaseError as error:
                raise WorkError(f"the {self._what} {self.path}, begun anew, failed: {error}") from error

    def close(self) -> None:
        """Close the connection; the next operation opens it again."""
        with self._lock:
            if self._connection is not None:
                # Of a damaged file the closing fails as well.
                with suppress(sqlite3.Error):
                    self._connection.close()
                self._connection = None

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_lock", "_connection", "_process", "_inode")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            self.close()

    def _transaction(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._open()
        connection.execute("BEGIN IMMEDIATE")
        try:
            result = operation(connection)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        return result

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._process == os.getpid():
            return self._connection
        # A connection that came with a fork belongs to the parent: it is neither used nor closed here.
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Tables are made and the kind of journal is chosen by one process while the others wait.
            with FileLock(f"{self.path}.lock", timeout=_BUSY_S):
                connection = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
                try:
                    self._prepare(connection)
                except BaseException:
                    connection.close()
                    raise
        except OSError as error:
            raise RequestError(f"the {self._what} {self.path} cannot be opened: {error.strerror or error}") from None
        except sqlite3.OperationalError as error:
            raise RequestError(f"the {self._what} {self.path} cannot be opened: {error}") from None
        self._connection, self._process = connection, os.getpid()
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self._inode = self.path.stat().st_ino
        mark = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if mark != self._application_id and tables:
            raise RequestError(f"{self.path} is a database of something else, not a {self._what}; name another file")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        # Also of a file that is there: it may be from before a table was thought of.
        connection.execute("BEGIN IMMEDIATE")
        for statement in (*self._schema, f"PRAGMA application_id = {self._application_id}"):
            connection.execute(statement)
        connection.execute("COMMIT")

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        self.close()
        if not self._replaceable:
            raise RequestError(
                f"the {self._what} {self.path} is damaged ({error}); move it away to begin a new one"
            ) from error
        with FileLock(f"{self.path}.lock", timeout=_BUSY_S):
            # Another process may have met the same damage and have begun anew already.
            if not self.path.exists() or self.path.stat().st_ino != self._inode:
                return
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
                number += 1
            for suffix in ("-wal", "-shm", ""):
                with suppress(FileNotFoundError):
                    Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        warnings.warn(
            f"the {self._what} {self.path} is damaged ({error}): it was set aside as {aside.name} and begun anew",
            stacklevel=5,
        )


def _damaged(error: sqlite3.DatabaseError) -> bool:
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGED
