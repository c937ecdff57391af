"""The answers of a step, none of which is waited for longer than it would take others to give it.

Tasks wait in one queue, in the order in which they were submitted. Once fewer are open than there are workers, some
worker has nothing to do. A task that has then taken twice as long as its cost lets expect is asked again of workers
that are free, in pieces; whichever answer comes first is taken. Answers are functions of the step: they are equal.

    expected seconds of a task   its cost · (seconds so far, preparation included, · workers / cost of what is done)
    begun at the latest          when so many were done that, first in first out, a worker was free for it
"""

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deepzero_core.errors import LostError

_LATE = 2.0
_GRACE_S = 0.05
_MOST_ATTEMPTS = 4


class Future(Protocol):
    """Of a task, or of a question through a lane."""

    key: str

    @property
    def status(self) -> str: ...

    def result(self) -> Any: ...

    def add_done_callback(self, fn: Callable[[Any], object], /) -> None: ...


class Asking(Protocol):
    """Dask's client, or lanes. processing: by worker, the keys of what it has to answer."""

    @property
    def status(self) -> str: ...

    def processing(self) -> Mapping[str, Sequence[str]]: ...


@dataclass
class Task:
    """Something to be answered. cost: in any unit. again(n, workers): futures of its pieces, n of them or fewer."""

    cost: float
    first: Future
    again: Callable[[int, Sequence[str]], list[Future]]

    def __post_init__(self) -> None:
        self.attempts: list[list[Future]] = [[self.first]]
        self.expected_by = 0.0


class Answers:
    """Waits for all tasks; for each, `chosen[k]` are then the futures that answer it, one or its pieces in order."""

    def __init__(
        self, client: Asking, tasks: Sequence[Task], workers: Callable[[], int], timeout_s: Callable[[], float]
    ):
        self._client, self._tasks = client, tasks
        self._workers, self._timeout_s = workers, timeout_s
        self.chosen: dict[int, list[Future]] = {}
        self.asked_again = 0
        self._owner: dict[str, int] = {}
        self._done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._began, self._waited = time.monotonic(), 0.0
        self._ends: list[float] = []
        for number, task in enumerate(tasks):
            self._watch(number, task.first)

    def wait(self) -> None:
        """Until every task is answered.

        Raises:
            LostError: nothing came back for longer than the time-out, which begins again with each answer.
            ConnectionError: the client has lost its scheduler. And whatever a task raised.
        """
        while len(self.chosen) < len(self._tasks):
            idle = len(self._tasks) - len(self.chosen) < self._workers()
            quarter_s, looked = self._timeout_s() / 4, time.monotonic()
            look_s = min(_GRACE_S if idle else 1.0, quarter_s)
            try:
                self._take(self._done.get(timeout=look_s))
            except queue.Empty:
                # A machine that was asleep has not waited: a look counts for little more than it was to take.
                self._waited += min(time.monotonic() - looked, look_s + min(1.0, quarter_s))
                self._check()
                idle = True  # so many may be open only because a slow worker has them all
            if idle:
                self._ask_again()

    def futures(self) -> list[Future]:
        return [future for task in self._tasks for attempt in task.attempts for future in attempt]

    def _watch(self, number: int, future: Future) -> None:
        self._owner[future.key] = number
        future.add_done_callback(self._done.put)

    def _take(self, future: Future) -> None:
        heard, self._waited = time.monotonic(), 0.0
        number = self._owner[future.key]
        if number in self.chosen:
            return
        if future.status != "finished":
            future.result()  # raises
        whole = [attempt for attempt in self._tasks[number].attempts if all(f.status == "finished" for f in attempt)]
        if whole:
            self.chosen[number] = whole[0]
            self._ends.append(heard)

    def _check(self) -> None:
        if self._client.status != "running":
            raise ConnectionError(f"the way to the Dask workers is {self._client.status}")
        timeout_s = self._timeout_s()
        if self._waited > timeout_s:
            raise LostError(
                f"no answer from the {self._workers()} Dask workers for {timeout_s:g} s "
                f"({len(self.chosen)} of {len(self._tasks)} tasks of this step are done)"
            )

    def _ask_again(self) -> None:
        late = [number for number in range(len(self._tasks)) if number not in self.chosen and self._is_late(number)]
        if not late:
            return
        busy = self._client.processing()
        free = [worker for worker, keys in busy.items() if not any(key in self._owner for key in keys)]
        if not free:
            return
        for number in late:
            task = self._tasks[number]
            pieces = task.again(max(1, len(free) // len(late)), free)
            task.attempts.append(pieces)
            task.expected_by = time.monotonic() + _LATE * self._seconds(task) + _GRACE_S
            self.asked_again += 1
            for future in pieces:
                self._watch(number, future)

    def _is_late(self, number: int) -> bool:
        task = self._tasks[number]
        if not self._ends or len(task.attempts) == _MOST_ATTEMPTS:
            return False
        if len(task.attempts) == 1:
            place = number - self._workers()
            begun = self._began if place < 0 else self._ends[min(place, len(self._ends) - 1)]
            task.expected_by = begun + _LATE * self._seconds(task) + _GRACE_S
        return time.monotonic() > task.expected_by

    def _seconds(self, task: Task) -> float:
        done = sum(self._tasks[number].cost for number in self.chosen)
        return task.cost * (self._ends[-1] - self._began) * self._workers() / done if done else float("inf")
