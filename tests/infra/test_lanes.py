"""Workers asked through lanes, without Dask's scheduler: the same bits, and tasks where that does not work."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from torch.nn import functional as F

from deepzero_core.data import prepare
from deepzero_core.errors import LostError, WorkError
from deepzero_core.training import Batch, CGESource
from infra.cluster import connect
from infra.doors import Door, GivenUpError, door_in, folder_of_doors, mine
from infra.forward import DistributedCGE
from infra.lanes import Asked, LaneLostError, Lanes
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
def two() -> Iterator[Client]:
    with connect(2, None, 60) as client:
        yield client


class Steps:
    """Steps on workers, held against this process; how many went by tasks."""

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

    def begin(self) -> None:
        """Until every worker has been given a task, and there is a lane to it."""
        deadline = time.monotonic() + 60
        while not self._source._lanes.lead_to(self._source.client.nthreads()):
            assert time.monotonic() < deadline
            self.go()
        self.by_tasks = 0

    def go(self) -> None:
        epoch, index = divmod(self._number, self._batches.steps_per_epoch)
        batch = Batch.of(self._number, epoch, index, *self._batches.batch(epoch, index))
        self._number += 1
        found = self._source.estimate(self._module, batch, None)
        expected = self._here.estimate(self._module, batch, None)
        assert found.loss == expected.loss
        assert all(torch.equal(gradient, found.gradients[name]) for name, gradient in expected.gradients.items())


def test_no_step_but_the_first_ones_takes_the_way_through_the_scheduler(
    problem: Problem, two: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DistributedCGE(two, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        steps.go()
        assert steps.by_tasks == 1
        steps.begin()
        for _ in range(6):  # across the end of an epoch, before which a worker draws the first batch of the next
            steps.go()
        assert steps.by_tasks == 0
        folder = source._lanes.folder
        assert len(list(folder.iterdir())) == 2
    assert not folder.exists()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "deepzero-lane"]


def test_workers_that_see_no_door_get_tasks(problem: Problem, two: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with DistributedCGE(two, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        steps.begin()
        shutil.rmtree(source._lanes.folder)
        source._lanes.lead_to(())
        steps.go()
        assert steps.by_tasks == 1


def test_a_worker_that_dies_changes_no_bit(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(2, None, 60) as client, DistributedCGE(client, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        steps.begin()
        os.kill(min(client.run(os.getpid).values()), signal.SIGKILL)
        for _ in range(3):
            steps.go()
        client.wait_for_workers(2, timeout=60)
        pids = client.run(os.getpid).values()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        steps.go()
        steps.begin()
        steps.go()
        assert steps.by_tasks == 0, "there are lanes to their successors"


def test_a_worker_killed_in_the_middle_of_a_step_changes_no_bit(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(problem, batches={**problem.batches, "batch_size": 64}, model={**problem.model, "depth": 3})
    with connect(2, None, 60) as client, DistributedCGE(client, slow) as source:
        steps = Steps(slow, source, monkeypatch)
        steps.begin()
        victim = min(client.run(os.getpid).values())
        killed = []

        def kill() -> None:
            while not all(source._lanes.processing().values()):
                time.sleep(0.001)
            killed.append(True)
            os.kill(victim, signal.SIGKILL)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        steps.go()
        assert killed
        assert steps.by_tasks == 0, "the other one has answered"


def test_a_worker_that_hangs_is_not_waited_for(problem: Problem, two: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with DistributedCGE(two, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        steps.begin()
        hanging = min(two.run(os.getpid).values())
        os.kill(hanging, signal.SIGSTOP)
        try:
            steps.go()
            steps.go()
        finally:
            os.kill(hanging, signal.SIGCONT)
        assert source.asked_again > 0
        steps.go()
        assert steps.by_tasks == 0


def test_workers_that_fall_silent_end_the_step(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(1, None, 60) as client, DistributedCGE(client, problem) as source:
        steps = Steps(problem, source, monkeypatch)
        steps.begin()
        (pid,) = client.run(os.getpid).values()
        source.timeout_s = 2
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(LostError, match=r"no answer from the 1 Dask workers for 2 s"):
                steps.go()
        finally:
            os.kill(pid, signal.SIGCONT)


class Workers:
    """Doors in this process, and lanes to them."""

    def __init__(self) -> None:
        self.lanes = Lanes()
        self.doors: dict[str, Door] = {}
        self.idle: list[str] = []

    def open(self, name: str, answer: Callable[[bytes, Callable[[], bool]], bytes]) -> None:
        self.doors[name] = Door(door_in(self.lanes.folder, name), answer, lambda: self.idle.append(name))
        assert self.lanes.lead_to(self.doors)


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.lanes.close()
    for door in made.doors.values():
        door.close()


def question(name: str) -> Asked:
    return Asked(("step", b""), name.encode())


def test_what_a_worker_raises_arrives_and_the_lane_goes_on(workers: Workers) -> None:
    class LocalError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    wrong: list[Exception] = [LostError("the box is gone"), LocalError(1, 2)]

    def answer(asked: bytes, given_up: object) -> bytes:
        if wrong:
            raise wrong.pop(0)
        return b"done"

    workers.open("one", answer)
    first, second, third = questions = [question(name) for name in ("a", "b", "c")]
    workers.lanes.ask(questions)
    with pytest.raises(LostError, match=r"^the box is gone$"):
        first.result(10)
    with pytest.raises(WorkError, match=r"^LocalError: 1 and 2$"):
        second.result(10)
    assert third.result(10) == b"done"
    assert (first.status, third.status) == ("error", "finished")


def test_what_is_taken_back_is_given_up_and_what_waits_is_forgotten(workers: Workers) -> None:
    begun = threading.Event()

    def answer(asked: bytes, given_up: Callable[[], bool]) -> bytes:
        begun.set()
        while b"endless" in asked:
            if given_up():
                raise GivenUpError
            time.sleep(0.001)
        return b"done"

    workers.open("one", answer)
    endless, waiting, wanted = questions = [question(name) for name in ("endless", "waiting", "wanted")]
    workers.lanes.ask(questions)
    assert begun.wait(10)
    assert workers.lanes.processing() == {"one": [endless.key]}
    workers.lanes.take_back([endless, waiting])
    assert wanted.result(10) == b"done"
    with pytest.raises(GivenUpError):
        endless.result(10)
    assert waiting.status == "pending"
    # Taken back too late: the answer has left, and the next question is answered as any other.
    workers.lanes._lanes["one"]._connection.send_bytes(b"")
    workers.lanes.ask([after := question("after")])
    assert after.result(10) == b"done"
    deadline = time.monotonic() + 10
    while not workers.idle:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_lane_that_ends_leaves_its_question_to_the_others_and_the_last_one_says_so(workers: Workers) -> None:
    def leaves(asked: bytes, given_up: object) -> bytes:
        workers.lanes._lanes["leaves"]._socket.shutdown(2)
        return b""

    workers.open("leaves", leaves)
    workers.lanes.ask(lost := [question("a"), question("b")])
    for asked in lost:
        with pytest.raises(LaneLostError):
            asked.result(10)
    assert workers.lanes.status == "closed"

    workers.open("stays", lambda asked, given_up: b"done")
    workers.lanes.ask(found := [question(str(number)) for number in range(20)])
    assert [asked.result(10) for asked in found] == [b"done"] * 20
    assert workers.lanes.status == "running"


def test_a_door_is_opened_only_in_a_folder_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of_doors()
    try:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert mine(folder)
        assert not mine(tmp_path / "elsewhere")
        monkeypatch.setattr(os, "getuid", lambda: 1 << 20)
        assert not mine(folder)
    finally:
        folder.rmdir()
