"""Questions shared out to Dask workers, of which each keeps one member that answers them.

    member    what `factory`, "package.module:callable", makes of plain arguments: called with a question, it answers.
              Built when first asked, kept, closed with the block; one question at a time and one member per worker
    question  whatever travels without code; answers come back in the order of the questions

A question whose worker is lost goes to another one. One that has ended every worker it went to is given back as `Lost`:
what it means is for the caller to say.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from distributed import CancelledError, Client, Future, KilledWorker, Worker, WorkerPlugin, get_worker

from deepzero_core.callables import reason, resolve
from deepzero_core.errors import WorkError
from infra.dask_memory import forget_names
from infra.plugins import Absent, name_for, present, withdraw
from infra.waiting import finished, log_workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lost:
    """In place of an answer: so many workers have ended over the question."""

    workers: int


class FanOutWorker(WorkerPlugin):
    """A worker's member; made again by the plugin on every replacement of the worker."""

    def __init__(self, name: str, factory: str, arguments: Mapping[str, Any], threads: int) -> None:
        self.name, self._factory, self._arguments, self._threads = name, factory, arguments, threads
        self._member: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FanOutWorker, (self.name, self._factory, self._arguments, self._threads)

    def setup(self, worker: Worker) -> None:
        # A worker that somebody else has started may have several threads; a member is for one.
        self._turn = threading.Lock()

    def teardown(self, worker: Worker) -> None:
        if hasattr(self._member, "close"):
            self._member.close()

    def answer(self, question: Any) -> Any:
        """Built here and not in `setup`, so that its mistakes are those of a question and are reported."""
        with self._turn:
            torch.set_num_threads(self._threads)
            try:
                if self._member is None:
                    self._member = resolve(self._factory, what="member")(**self._arguments)
                return self._member(question)
            except OSError as error:  # which would look like a lost connection over there
                raise WorkError(f"a Dask worker could not answer: {reason(error)}") from error


def _answer(plugin: str, question: Any) -> Any:
    worker: FanOutWorker | None = get_worker().plugins.get(plugin)
    forget_names()
    return Absent.PLUGIN if worker is None else worker.answer(question)


class FanOut:
    """`ask(questions)`, answered by the workers of `client`. Use as a context manager.

    factory, arguments: of the members. timeout_s: how long there may be no worker. threads: of torch, in every member.
    """

    def __init__(
        self, client: Client, factory: str, arguments: Mapping[str, Any], *, timeout_s: float = 60.0, threads: int = 1
    ) -> None:
        self.client, self.timeout_s = client, timeout_s
        self._name = name_for(client, "fan-out")
        self._plugin = FanOutWorker(self._name, factory, arguments, threads)
        self._asked = 0

    def __enter__(self) -> "FanOut":
        self.client.register_plugin(self._plugin)
        log_workers(self.client, log, "what it was asked is asked of another")
        return self

    def __exit__(self, *_: object) -> None:
        withdraw(self.client, self._name, topic="all")

    def ask(self, questions: Sequence[Any]) -> list[Any | Lost]:
        """The answers, in order.

        Raises:
            WorkError: no worker for longer than the time-out, or the scheduler was lost.
            Whatever a member raises.
        """
        answers = self._asked_together(questions)
        for place, answer in enumerate(answers):
            # Those that were waiting on a worker when it ended are blamed, too: each gets a hearing by itself.
            if isinstance(answer, Lost) and len(questions) > 1:
                (answers[place],) = self._asked_together([questions[place]])
        return answers

    def _asked_together(self, questions: Sequence[Any]) -> list[Any | Lost]:
        futures: list[Future] = []
        try:
            for question in questions:
                self._asked += 1
                # Kind first: by it Dask keeps them in one queue for all workers.
                key = f"deepzero-question-{self._name}-{self._asked}"
                futures.append(self.client.submit(_answer, self._name, question, key=key, pure=False))
            finished(self.client, futures, self.timeout_s, every=True)
            try:
                return [present(answer) for answer in self.client.gather(futures)]
            except KilledWorker:
                return [_answer_of(future) for future in futures]
        except (CancelledError, OSError) as error:
            raise WorkError("the Dask scheduler was lost in the middle of a step") from error
        finally:
            if self.client.status == "running":
                with suppress(CancelledError, OSError, TimeoutError):
                    self.client.cancel([future for future in futures if not future.done()])


def _answer_of(future: Future) -> Any | Lost:
    try:
        return present(future.result())
    except KilledWorker as error:
        return Lost(error.allowed_failures + 1)
