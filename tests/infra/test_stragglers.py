"""Slow workers, and workers that come and go: the step waits for none of them, and no bit changes."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from distributed import Client, Future
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from deepzero_core import GradientEstimate
from deepzero_core.data import prepare
from deepzero_core.training import Batch, CGESource
from infra import forward, ranges
from infra.cluster import connect
from infra.forward import DistributedCGE
from infra.problem import Problem
from infra.ranges import ENOUGH, FEW, Range, divided, grouped, paces

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


by_tasks = partial(DistributedCGE, lanes=False)
"""As where the workers are on other machines; those of this one are asked through lanes (`test_lanes`)."""


@pytest.fixture(scope="module")
def steps(problem: Problem) -> "Steps":
    return Steps(problem)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """A step of many chunks, so that things happen within it."""
    model = {"name": "cnn", "in_channels": 1, "num_classes": 10, "image_size": (8, 8), "depth": 2, "width": 12}
    return Problem(
        store=prepare("digits", home=tmp_path_factory.mktemp("digits")).path,
        batches={"batch_size": 128, "seed": 0, "augmentation": {"crop_padding": 0, "flip": False}, "limit": 512},
        model={**model, "arguments": {}, "seed": 0},
        mu=5e-3,
        difference="forward",
        memory=1 << 17,
    )


class Steps:
    """Steps of a problem, on workers and in this process."""

    def __init__(self, problem: Problem) -> None:
        self._here = CGESource(F.cross_entropy, problem.mu, "forward", problem.memory)
        self._module, self._batches = problem.build_module().train(), problem.build_batches()
        self._expected: dict[int, GradientEstimate] = {}

    def on(self, source: DistributedCGE, number: int) -> GradientEstimate:
        """Of the workers; the same bits as here, which is checked."""
        batch = Batch.of(number, 0, number, *self._batches.batch(0, number))
        if number not in self._expected:
            self._expected[number] = self._here.estimate(self._module, batch, None)
        found, expected = source.estimate(self._module, batch, None), self._expected[number]
        assert found.loss == expected.loss
        assert all(torch.equal(value, found.gradients[name]) for name, value in expected.gradients.items())
        return found


def workers_of(client: Client) -> list[str]:
    return list(client.nthreads())


def hold(gate: str) -> None:
    """On a worker: count the chunks that it evaluates, none of which ends while the gate is there; `held` beside it."""
    import time
    from pathlib import Path

    from infra import forward_worker

    real = forward_worker.slope
    forward_worker.counted = 0

    def held(*arguments: object) -> object:
        while Path(gate).exists():
            Path(gate).with_name("held").touch()
            time.sleep(0.01)
        forward_worker.counted += 1
        return real(*arguments)

    forward_worker.slope = held


def counted() -> int:
    from infra import forward_worker

    return int(forward_worker.counted)


@pytest.fixture(scope="module")
def three(problem: Problem) -> Iterator[DistributedCGE]:
    """Three workers."""
    with connect(3, None, 60) as client, by_tasks(client, problem) as source:
        yield source


def test_theta_is_with_some_workers_before_the_others_fetch_it(
    steps: Steps, three: DistributedCGE, monkeypatch: pytest.MonkeyPatch
) -> None:
    mib = 1 << 20
    assert [ranges.copies_for(workers, mib) for workers in (1, 32, 33, 100, 1024)] == [1, 1, 6, 10, 32]
    assert ranges.copies_for(1024, 1 << 14) == 1
    monkeypatch.setattr(forward, "copies_for", lambda workers, theta: workers)
    monkeypatch.setattr(forward, "_ALONG", 0)
    seen: list[int] = []
    real = three._spread

    def spread(held: Future, copies: int) -> None:
        real(held, copies)
        seen.extend(len(workers) for workers in three.client.who_has([held]).values())

    monkeypatch.setattr(three, "_spread", spread)
    steps.on(three, 0)
    assert seen == [3]


def test_a_worker_that_does_not_answer_is_not_waited_for(steps: Steps, three: DistributedCGE, tmp_path: Path) -> None:
    """The limit of a slow worker: it holds its ranges for as long as the step lasts, and longer."""
    client, gate, before = three.client, tmp_path / "gate", three.asked_again
    slow, *fast = workers_of(client)
    client.run(hold, str(gate), workers=[slow])
    client.run(hold, str(tmp_path / "never"), workers=fast)
    gate.touch()
    steps.on(three, 1)
    steps.on(three, 2)  # and while it still sits on a range of the step before
    assert client.run(counted, workers=[slow]) == {slow: 0}
    assert all(client.run(counted, workers=fast).values())
    assert three.asked_again > before
    gate.unlink()
    # What it was in the middle of it has given up after the chunk, and takes part again.
    deadline = time.monotonic() + 120
    while client.run(counted, workers=[slow])[slow] < 2:
        assert time.monotonic() < deadline
        steps.on(three, 3)


def in_the_middle(source: DistributedCGE, gate: Path, action: Callable[[], None]) -> threading.Thread:
    """Do something in the next step, of which the present workers finish no range before the gate is open again."""
    held = gate.with_name("held")
    source.client.run(hold, str(gate))
    held.unlink(missing_ok=True)
    gate.touch()

    def act() -> None:
        deadline = time.monotonic() + 60
        while not held.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        action()
        gate.unlink(missing_ok=True)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_workers_that_come_and_go_within_steps_change_no_bit(steps: Steps, problem: Problem, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with connect(1, None, 60) as client, by_tasks(client, problem) as source:
        steps.on(source, 0)
        (first,) = workers_of(client)

        def join() -> None:
            client.cluster.scale(2)
            client.wait_for_workers(2, timeout=60)

        joining = in_the_middle(source, gate, join)
        steps.on(source, 1)
        joining.join(timeout=60)
        (second,) = set(workers_of(client)) - {first}

        def retire() -> None:
            gate.unlink()  # a worker that is retired ends what it has begun
            client.retire_workers([first], close_workers=True)

        retiring = in_the_middle(source, gate, retire)
        steps.on(source, 2)
        retiring.join(timeout=60)
        assert workers_of(client) == [second]

        (pid,) = client.run(os.getpid).values()
        killing = in_the_middle(source, gate, lambda: os.kill(pid, signal.SIGKILL))
        steps.on(source, 3)
        killing.join(timeout=60)
        assert not any(thread.is_alive() for thread in (joining, retiring, killing))
        # The scheduler may not have noticed yet, and then has no answer of it.
        assert pid not in client.run(os.getpid, on_error="ignore").values()


def test_many_workers_get_many_ranges_and_a_short_step_few() -> None:
    def number(workers: int, seconds: float) -> int:
        return len(grouped([seconds / 5000] * 5000, workers))

    assert [number(workers, 1000.0) for workers in (1, 8, 9, 100, 1024)] == [ENOUGH, ENOUGH, 27, 295, 1000]
    assert [number(1024, seconds) for seconds in (1000.0, 4.0, 0.001)] == [1000, 63, ENOUGH]
    assert [number(2, seconds) for seconds in (0.001, 2.0, 11.0, 1000.0)] == [2 * FEW, 2 * FEW, 11, ENOUGH]
    assert grouped([], 3) == []


def test_where_there_is_a_worker_for_every_range_they_are_equal() -> None:
    sizes = {len(group) for group in grouped([0.001] * 4000, 1024)}
    assert max(sizes) - min(sizes) <= 1
    some = grouped([0.25] * 4000, 10)
    assert len(some[0]) > 2 * len(some[-1]), "and where there is not, the last are small"


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=60), st.integers(2, 9))
def test_the_costliest_chunks_come_first_and_each_once(costs: list[float], workers: int) -> None:
    order = [position for group in grouped(costs, workers) for position in group]
    assert sorted(order) == list(range(len(costs)))
    assert all(costs[one] >= costs[other] for one, other in pairwise(order))


def test_a_parameter_has_the_pace_of_its_fastest_chunk() -> None:
    first = Range((("a", np.arange(4)), ("b", np.arange(2))))
    second = Range((("a", np.arange(4, 6)),))
    assert paces([first, second], [[8.0, 1.0], [1.0]]) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 9])
def test_a_range_is_divided_into_its_chunks_in_order(pieces: int) -> None:
    whole = Range(tuple((f"p{number}", np.arange(number + 1)) for number in range(5)))
    parts = divided(whole, pieces)
    assert len(parts) == min(pieces, 5)
    assert [name for part in parts for name, _ in part.chunks] == [name for name, _ in whole.chunks]
    assert max(len(part.chunks) for part in parts) - min(len(part.chunks) for part in parts) <= 1
