"""One worker, asked without Dask's scheduler: the same bits, and a task where that does not work."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed import Client, Worker
from torch.nn import functional as F

from deepzero_core.data import prepare
from deepzero_core.errors import LostError
from deepzero_core.training import Batch, CGESource
from infra import direct, forward
from infra.cluster import connect
from infra.direct import ask, teach, unteach
from infra.forward import DistributedCGE
from infra.problem import Problem


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    model = {"name": "cnn", "in_channels": 1, "num_classes": 10, "image_size": (8, 8), "depth": 1, "width": 4}
    return Problem(
        store=prepare("digits", home=tmp_path_factory.mktemp("digits")).path,
        batches={"batch_size": 16, "seed": 0, "augmentation": {"crop_padding": 1, "flip": False}, "limit": 64},
        model={**model, "arguments": {}, "seed": 0},
        mu=5e-3,
        difference="forward",
        memory=1 << 20,
    )


@pytest.fixture(scope="module")
def one() -> Iterator[Client]:
    with connect(1, None, 60) as client:
        yield client


class Steps:
    """Steps of one worker, held against this process; how many went by tasks."""

    def __init__(self, problem: Problem, source: DistributedCGE, monkeypatch: pytest.MonkeyPatch) -> None:
        self._here = CGESource(F.cross_entropy, problem.mu, problem.difference, problem.memory)
        self._source = source
        self._module, self._batches = problem.build_module().train(), problem.build_batches()
        self._number = self.by_tasks = 0
        tasks = source._tasks

        def counted(*arguments: Any) -> Any:
            self.by_tasks += 1
            return tasks(*arguments)

        monkeypatch.setattr(source, "_tasks", counted)

    def go(self) -> None:
        epoch, index = divmod(self._number, self._batches.steps_per_epoch)
        batch = Batch.of(self._number, epoch, index, *self._batches.batch(epoch, index))
        self._number += 1
        found = self._source.estimate(self._module, batch, None)
        expected = self._here.estimate(self._module, batch, None)
        assert found.loss == expected.loss
        assert all(torch.equal(gradient, found.gradients[name]) for name, gradient in expected.gradients.items())


def test_all_steps_but_the_first_are_asked_directly(
    problem: Problem, one: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DistributedCGE(one, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        for _ in range(6):  # across the end of an epoch, before which the worker draws the first batch of the next
            steps.go()
        assert steps.by_tasks == 1


def test_a_worker_that_does_not_know_the_question_is_given_a_task(
    problem: Problem, one: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DistributedCGE(one, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        steps.go()
        name = source._name
        one.run(lambda dask_worker: unteach(dask_worker, name))
        steps.go()
        assert steps.by_tasks == 2


def test_a_worker_that_cannot_be_reached_is_given_tasks(
    problem: Problem, one: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def nowhere(client: Client, address: str, question: str, *arguments: object) -> object:
        tried.append(address)
        return ask(client, "tcp://127.0.0.1:1", question, *arguments)

    monkeypatch.setattr(forward, "ask", nowhere)
    monkeypatch.setattr(direct, "_CONNECTED_S", 1.0)
    with DistributedCGE(one, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        for _ in range(3):
            steps.go()
        assert steps.by_tasks == 3
    assert len(tried) == 1, "it is not tried again"


def test_a_worker_that_dies_is_replaced_and_asked_directly_again(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(1, None, 60) as client, DistributedCGE(client, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        steps.go()
        (pid,) = client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            steps.go()
        assert steps.by_tasks == 2


def test_a_worker_that_falls_silent_ends_the_step(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(1, None, 60) as client, DistributedCGE(client, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        steps.go()
        (pid,) = client.run(os.getpid).values()
        source.timeout_s = 2
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(LostError, match=r"no answer from the 1 Dask workers for 2 s"):
                steps.go()
        finally:
            os.kill(pid, signal.SIGCONT)


def test_what_a_worker_raises_arrives(one: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def taught(dask_worker: Worker) -> None:
        def answer(number: int) -> float:
            return 1 / number

        teach(dask_worker, "inverse", answer, lambda: None)

    (address,) = one.nthreads()
    one.run(taught)
    assert ask(one, address, "inverse", 4).result(60) == 0.25
    with pytest.raises(ZeroDivisionError):
        ask(one, address, "inverse", 0).result(60)
    assert ask(one, address, "unheard-of").result(60) is None
    monkeypatch.setattr(direct, "_CONNECTED_S", 1.0)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        ask(one, "tcp://127.0.0.1:1", "inverse", 4).result(60)
