"""Lanes to workers of this machine: what Dask's scheduler has nothing to decide about does not pass through it.

A task passes through the scheduler four times, and its message through two event loops on either side, whose code is in
no cache any more after a step (`python -m benchmarks --case workers` times both). There is one queue for all lanes, and
whoever is idle takes the next question. Answers are futures, as those of tasks are.
"""

import os
import shutil
import socket
import struct
import threading
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from uuid import uuid4

from infra.doors import ANSWER, ERROR, GivenUpError, door_in, folder_of_doors
from infra.packed import packed, unpacked

_STUCK_S = 10
"""For a question to leave: its worker hangs otherwise."""


class LaneLostError(Exception):
    """The last lane has ended, and others will not answer."""


class Asked(Future[bytes]):
    """A question, and the future of its answer.

    step: name and bytes of what all questions of a step have in common; a lane sends it once. own: the rest.
    """

    def __init__(self, step: tuple[str, bytes], own: bytes) -> None:
        super().__init__()
        self.key = uuid4().hex
        self.step, self.own = step, own

    @property
    def status(self) -> str:
        """In Dask's words."""
        if not self.done():
            return "pending"
        return "cancelled" if self.cancelled() else "error" if self.exception() else "finished"


class Lanes:
    """To the workers of one coordinator. `status` and `processing` are those of Dask's client."""

    def __init__(self) -> None:
        self.folder = folder_of_doors()
        self._lanes: dict[str, _Lane] = {}
        self._questions: deque[Asked] = deque()
        self._change = threading.Condition()

    @property
    def status(self) -> str:
        return "running" if self._open() else "closed"

    def lead_to(self, addresses: Iterable[str]) -> bool:
        """Whether there is one to each of these workers: made now where that can be. Those to others are closed."""
        wanted = set(addresses)
        for address in [a for a, lane in self._lanes.items() if a not in wanted or lane.lost]:
            self._lanes.pop(address).close()
        for address in wanted - self._lanes.keys():
            with suppress(OSError):
                self._lanes[address] = _Lane(Client(str(door_in(self.folder, address)), "AF_UNIX"), self)
        return bool(wanted) and self._lanes.keys() == wanted

    def ask(self, questions: Sequence[Asked]) -> None:
        """In this order."""
        with self._change:
            self._questions.extend(questions)
            self._change.notify_all()

    def processing(self) -> dict[str, list[str]]:
        """By worker, the key of what it is asked now."""
        return {address: [lane.asked.key] if lane.asked else [] for address, lane in self._open().items()}

    def take_back(self, questions: Collection[Asked]) -> None:
        """Nobody waits for these any more."""
        keys = {question.key for question in questions}
        with self._change:
            self._questions = deque(question for question in self._questions if question.key not in keys)
        for lane in self._open().values():
            lane.take_back(keys)

    def close(self) -> None:
        """Whatever is still asked is not answered."""
        for lane in self._lanes.values():
            lane.close()
        for lane in self._lanes.values():
            lane.join(_STUCK_S)
        self._lanes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wake(self) -> None:
        """Have every lane look whether it is to go on."""
        with self._change:
            self._change.notify_all()

    def next(self, lane: "_Lane") -> Asked | None:
        """The next question; None for a lane that is closed."""
        with self._change:
            self._change.wait_for(lambda: self._questions or lane.lost)
            return None if lane.lost else self._questions.popleft()

    def lose(self, lane: "_Lane", asked: Asked | None) -> None:
        """A lane has ended, and what it was asked is asked of another; with the last one all questions are lost."""
        with self._change:
            lane.lost = True
            self._questions.extendleft([] if asked is None else [asked])
            lost = [] if self._open() else list(self._questions)
            if lost:
                self._questions.clear()
            self._change.notify_all()
        for question in lost:
            question.set_exception(LaneLostError())

    def _open(self) -> dict[str, "_Lane"]:
        return {address: lane for address, lane in list(self._lanes.items()) if not lane.lost}


class _Lane(threading.Thread):
    """asked: what its worker is asked now. lost: it leads nowhere any more."""

    def __init__(self, connection: Connection, lanes: Lanes) -> None:
        super().__init__(name="deepzero-lane", daemon=True)
        self.asked: Asked | None = None
        self.lost = False
        self._connection, self._lanes = connection, lanes
        self._step = ""
        self._turn = threading.Lock()
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _STUCK_S, 0))
        self.start()

    def run(self) -> None:
        with self._connection, self._socket:
            while (asked := self._lanes.next(self)) is not None:
                try:
                    self._ask(asked)
                    reply = self._connection.recv_bytes()
                except (EOFError, OSError):
                    break
                with self._turn:
                    self.asked = None
                if reply[:1] == ANSWER:
                    asked.set_result(reply[1:])
                else:
                    asked.set_exception(unpacked(reply[1:]) if reply[:1] == ERROR else GivenUpError())
        self._lanes.lose(self, self.asked)

    def take_back(self, keys: Collection[str]) -> None:
        """Tell the worker that it need not go on, if that is what it is asked."""
        with self._turn, suppress(OSError):
            if self.asked is not None and self.asked.key in keys:
                self._connection.send_bytes(b"")

    def close(self) -> None:
        self.lost = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._lanes.wake()

    def _ask(self, asked: Asked) -> None:
        name, shared = asked.step
        question = packed((name, b"" if name == self._step else shared, asked.own))
        with self._turn:
            self.asked, self._step = asked, name
            self._connection.send_bytes(question)
