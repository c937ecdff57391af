"""A worker's door: a socket through which a coordinator on the same machine asks it, without Dask in between.

It lies in a folder that the coordinator has made for its own user alone: whoever cannot open it is on another machine,
or somebody else, and gets tasks. Questions and answers are bytes. A connection carries one question at a time; the only
thing that is said meanwhile, b"", takes it back.
"""

import hashlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from deepzero_core.errors import WorkError
from infra.packed import packed, unpacked

ANSWER, ERROR, GIVEN_UP = b"a", b"e", b"g"
_LEFT_S = 2e-3

Answering = Callable[[bytes, Callable[[], bool]], bytes]
"""From a question, and whether it has been taken back since, to its answer."""


class GivenUpError(Exception):
    """What was asked is not wanted any more."""


class Door:
    """Open for any number of coordinators. idle: done when nothing more is asked after an answer."""

    def __init__(self, path: Path, answer: Answering, idle: Callable[[], object]) -> None:
        """OSError where the folder is not to be seen or written from here."""
        self._answer, self._idle = answer, idle
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._let_in, name="deepzero-door", daemon=True).start()

    def close(self) -> None:
        """Nobody comes in any more; who is in can stay."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes who waits at the door

    def _let_in(self) -> None:
        with self._socket, suppress(OSError):
            while True:
                connection = Connection(self._socket.accept()[0].detach())
                threading.Thread(target=self._serve, args=(connection,), name="deepzero-served", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection, suppress(EOFError, OSError):  # the coordinator has gone
            while True:
                question = connection.recv_bytes()
                if question:  # else it was taken back when the answer had left
                    connection.send_bytes(self._reply(question, connection))
                    if not connection.poll(_LEFT_S):
                        self._idle()

    def _reply(self, question: bytes, connection: Connection) -> bytes:
        try:
            return ANSWER + self._answer(question, lambda: connection.poll(0))
        except GivenUpError:
            return GIVEN_UP
        except Exception as error:
            return ERROR + _portable(error)


def folder_of_doors() -> Path:
    """A new one, for this user alone; with a short name, as a socket's has to be."""
    return Path(tempfile.mkdtemp(prefix="deepzero-doors-"))


def door_in(folder: Path, address: str) -> Path:
    """That of the worker with that address."""
    return folder / hashlib.sha256(address.encode()).hexdigest()[:16]


def mine(folder: Path) -> bool:
    """Whether a coordinator's folder is to be seen from here and is this user's."""
    try:
        return folder.stat().st_uid == os.getuid()
    except OSError:
        return False


def _portable(error: Exception) -> bytes:
    """An exception on its way to the coordinator; of one that cannot be sent, what it says."""
    try:
        sent = packed(error)
        unpacked(sent)
    except Exception:
        return packed(WorkError(f"{type(error).__name__}: {error}"))
    return sent
