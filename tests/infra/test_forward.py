"""Forward evaluation on real Dask workers: the same bits on any number of them, also when they die on the way."""

import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from deepzero_core import GradientEstimate, draw_masks
from deepzero_core.data import BatchSource, prepare
from deepzero_core.errors import WorkError
from deepzero_core.training import Batch, CGESource, Schedule, Trainer, TrainingSettings
from infra import cluster, forward
from infra.cluster import connect
from infra.forward import DistributedCGE
from infra.problem import Problem
from infra.ranges import ENOUGH, tapered

MEMORY = 1 << 20


by_tasks = partial(DistributedCGE, lanes=False)
"""As where the workers are on other machines; those of this one are asked through lanes (`test_lanes`)."""


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("digits", home=tmp_path_factory.mktemp("digits")).path


def problem(
    store: Path, *, depth: int = 1, width: int = 4, batch_size: int = 16, difference: str = "forward"
) -> Problem:
    return Problem(
        store=store,
        batches={
            "batch_size": batch_size,
            "seed": 0,
            "augmentation": {"crop_padding": 1, "flip": False},
            "limit": 4 * batch_size,
        },
        model={
            "name": "cnn",
            "in_channels": 1,
            "num_classes": 10,
            "image_size": (8, 8),
            "depth": depth,
            "width": width,
            "arguments": {},
            "seed": 0,
        },
        mu=5e-3,
        difference=difference,
        memory=MEMORY,
    )


@pytest.fixture
def small(store: Path) -> Problem:
    return problem(store)


@pytest.fixture
def slow(store: Path) -> Problem:
    """A step of a second or more, so that it can be interrupted."""
    return problem(store, depth=3, width=10, batch_size=128)


def batch_of(batches: BatchSource, number: int) -> Batch:
    epoch, index = divmod(number, batches.steps_per_epoch)
    return Batch.of(number, epoch, index, *batches.batch(epoch, index))


def here(
    problem: Problem, module: nn.Module, batch: Batch, coordinates: dict[str, torch.Tensor] | None
) -> GradientEstimate:
    source = CGESource(F.cross_entropy, problem.mu, problem.difference, problem.memory)
    return source.estimate(module, batch, coordinates)


def assert_same(one: GradientEstimate, other: GradientEstimate) -> None:
    assert (one.loss, one.queries) == (other.loss, other.queries)
    for name, gradient in one.gradients.items():
        assert torch.equal(gradient, other.gradients[name]), name
    for name, buffer in one.buffers.items():
        assert torch.equal(buffer, other.buffers[name]), name
    assert torch.equal(one.outputs, other.outputs)


def pids(client: Client) -> list[int]:
    return list(client.run(os.getpid).values())


@pytest.fixture(scope="module")
def two() -> Iterator[Client]:
    """Two workers for the tests that leave them alive or have them replaced."""
    with connect(2, None, 60) as client:
        yield client


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_trains_to_the_same_bits(small: Problem, workers: int) -> None:
    batches = small.build_batches()
    plan = TrainingSettings(
        steps=6, schedule=Schedule(0.1, 6), seed=2, ratios={"block1.conv.weight": 0.5, "linear.weight": 0.5}
    )
    alone = small.build_module()
    expected = list(Trainer(alone, batches, CGESource(F.cross_entropy, 5e-3, "forward", MEMORY), plan).run())
    spread = small.build_module()
    with connect(workers, None, 60) as client, by_tasks(client, small) as source:
        assert len(client.nthreads()) == workers
        assert list(Trainer(spread, batches, source, plan).run()) == expected
    for name, value in alone.state_dict().items():
        assert torch.equal(value, spread.state_dict()[name]), name


@pytest.fixture(params=["goes along", "is fetched"])
def theta(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How θ comes to the workers: a small one with every range, a large one as a task's result."""
    if request.param == "is fetched":
        monkeypatch.setattr(forward, "_ALONG", 0)


@pytest.mark.usefixtures("theta")
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_two_workers_estimate_what_this_process_does(store: Path, two: Client, difference: str) -> None:
    spread = problem(store, difference=difference)
    module, batches = spread.build_module().train(), spread.build_batches()
    some = draw_masks({"linear.weight": 0.7}, module, torch.Generator().manual_seed(1))
    with by_tasks(two, spread) as source:
        for number, coordinates in enumerate([None, some, {"linear.bias": some["linear.bias"]}, None]):
            batch = batch_of(batches, number)
            assert_same(source.estimate(module, batch, coordinates), here(spread, module, batch, coordinates))
            assert source.cost(module, coordinates) == here(spread, module, batch, coordinates).queries


def test_the_same_batch_at_other_parameters_is_not_answered_from_memory(small: Problem, two: Client) -> None:
    module, batch = small.build_module().train(), batch_of(small.build_batches(), 0)
    with by_tasks(two, small) as source:
        first = source.estimate(module, batch, None)
        with torch.no_grad():
            module.get_parameter("linear.weight").add_(0.5)
        second = source.estimate(module, batch, None)
    assert_same(second, here(small, module, batch, None))
    assert not torch.equal(first.gradients["linear.bias"], second.gradients["linear.bias"])


def test_ranges_follow_what_the_first_steps_took(small: Problem, two: Client) -> None:
    module, batches = small.build_module().train(), small.build_batches()
    with by_tasks(two, small) as source:
        cuts = []
        for number in range(4):
            batch = batch_of(batches, number)
            assert_same(source.estimate(module, batch, None), here(small, module, batch, None))
            cuts.append(source._cut)
        first, _, third, fourth = cuts
        assert first is not None and third is not None and third is fourth, "two steps were timed, and no more"
        assert set(source._pace) == set(dict(module.named_parameters()))
        assert third.costs != first.costs and sum(third.costs) == pytest.approx(
            sum(len(indices) * source._pace[name] for name, indices in third.parts)
        )


def test_without_a_coordinate_there_is_still_the_base_pass(small: Problem, two: Client) -> None:
    module, batch = small.build_module().train(), batch_of(small.build_batches(), 0)
    none = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in module.named_parameters()}
    with by_tasks(two, small) as source:
        assert_same(source.estimate(module, batch, none), here(small, module, batch, none))


def test_workers_keep_prefect_and_mlflow_out_and_compute_on_one_thread(small: Problem, two: Client) -> None:
    with by_tasks(two, small) as source:
        source.estimate(small.build_module().train(), batch_of(small.build_batches(), 0), None)
        loaded = two.run(lambda: sorted({"prefect", "mlflow", "torch"} & set(__import__("sys").modules)))
        threads = [two.submit(torch.get_num_threads, pure=False).result() for _ in range(4)]
    assert set(map(tuple, loaded.values())) == {("torch",)}
    assert set(threads) == {1}


def test_nothing_is_left_on_the_cluster(small: Problem, two: Client) -> None:
    with by_tasks(two, small) as source:
        source.estimate(small.build_module().train(), batch_of(small.build_batches(), 0), None)
    plugins = two.run(lambda dask_worker: [name for name in dask_worker.plugins if name.startswith("deepzero")])
    assert set(map(tuple, plugins.values())) == {()}
    deadline = time.monotonic() + 10
    while any(two.run(lambda dask_worker: len(dask_worker.data)).values()):
        assert time.monotonic() < deadline, "θ, coordinates and results stay in the workers' memory"
        time.sleep(0.1)


def test_workers_that_do_not_see_the_store_are_sent_its_images(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = problem(tmp_path / "store")
    shutil.copytree(store, own.store)
    module, batches = own.build_module().train(), own.build_batches()
    expected = [here(own, module, batch_of(batches, number), None) for number in range(2)]
    monkeypatch.setattr(forward, "shares_disk", lambda client: False)
    with connect(1, None, 60) as client, by_tasks(client, own) as source:
        own.store.rename(tmp_path / "elsewhere")
        for number, estimate in enumerate(expected):
            assert_same(source.estimate(module, batch_of(batches, number), None), estimate)


def while_it_runs(client: Client, action: Callable[[], None], *, done: int = 1) -> threading.Thread:
    """Do something in the middle of the next step: some ranges are done, others are not."""

    def act() -> None:
        def finished() -> int:
            states = [task.state for key, task in client.cluster.scheduler.tasks.items() if "-range-" in str(key)]
            return states.count("memory") if states.count("processing") + states.count("queued") else -1

        while finished() < done:
            time.sleep(0.005)
        action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_a_worker_killed_in_the_middle_of_a_step_changes_no_bit(
    slow: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    module, batches = slow.build_module().train(), slow.build_batches()
    expected = [here(slow, module, batch_of(batches, number), None) for number in range(3)]
    with caplog.at_level(logging.INFO, "infra"), connect(2, None, 60) as client, by_tasks(client, slow) as source:
        assert_same(source.estimate(module, batch_of(batches, 0), None), expected[0])
        victim = pids(client)[0]
        killing = while_it_runs(client, lambda: os.kill(victim, signal.SIGKILL))
        assert_same(source.estimate(module, batch_of(batches, 1), None), expected[1])
        killing.join(timeout=1)
        assert not killing.is_alive(), "the worker died during the step"
        assert victim not in pids(client)
        assert_same(source.estimate(module, batch_of(batches, 2), None), expected[2])
        client.wait_for_workers(2, timeout=30)
    warnings = [r.getMessage() for r in caplog.records if r.name == "infra.forward" and r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert re.fullmatch(
        r"Dask worker tcp://127\.0\.0\.1:\d+ was lost: its coordinate ranges are evaluated again", warnings[0]
    )


@pytest.mark.usefixtures("theta")
def test_all_workers_killed_at_once_change_no_bit(slow: Problem, caplog: pytest.LogCaptureFixture) -> None:
    module, batch = slow.build_module().train(), batch_of(slow.build_batches(), 0)

    def kill_all() -> None:
        for victim in victims:
            os.kill(victim, signal.SIGKILL)

    with caplog.at_level(logging.INFO, "infra"), connect(2, None, 60) as client, by_tasks(client, slow) as source:
        victims = pids(client)
        while_it_runs(client, kill_all)
        assert_same(source.estimate(module, batch, None), here(slow, module, batch, None))
        assert not set(victims) & set(pids(client))
    assert sum("was lost" in record.getMessage() for record in caplog.records) == 2


def test_workers_that_fall_silent_end_the_step_with_a_count(slow: Problem) -> None:
    module, batch = slow.build_module().train(), batch_of(slow.build_batches(), 0)
    with connect(2, None, 60) as client, by_tasks(client, slow) as source:
        stopped = [psutil.Process(pid) for pid in pids(client)]

        def silence() -> None:
            for process in stopped:
                process.suspend()
            source.timeout_s = 2

        while_it_runs(client, silence)
        with pytest.raises(WorkError) as failure:
            source.estimate(module, batch, None)
        for process in stopped:
            process.resume()
    found = re.fullmatch(
        r"no answer from the 2 Dask workers for 2 s \((\d+) of (\d+) tasks of this step are done\)",
        str(failure.value),
    )
    assert found, str(failure.value)
    assert 1 <= int(found[1]) < int(found[2]) <= ENOUGH + 1  # and the base pass


def test_a_network_that_kills_its_workers_is_a_failure_of_the_work(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "import os, torch\n"
        "class Poisonous(torch.nn.Module):\n"
        "    def __init__(self, main):\n"
        "        super().__init__()\n"
        "        self.main, self.linear = main, torch.nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        if self.training and os.getpid() != self.main:\n"
        "            os._exit(3)\n"
        "        return self.linear(x.flatten(1))\n"
    )
    (tmp_path / "poisonous.py").write_text(code)
    monkeypatch.setitem(cluster.SETTINGS, "distributed.scheduler.allowed-failures", 1)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plain = problem(store)
    model = {**plain.model, "name": "poisonous:Poisonous", "arguments": {"main": os.getpid()}}
    deadly = Problem(plain.store, plain.batches, model, plain.mu, plain.difference, plain.memory)
    module, batch = deadly.build_module().train(), batch_of(deadly.build_batches(), 0)
    with (
        connect(1, None, 60) as client,
        by_tasks(client, deadly) as source,
        pytest.raises(WorkError, match=r"a coordinate range was tried on 2 Dask workers and each of them died"),
    ):
        source.estimate(module, batch, None)


def shares(groups: int) -> list[float]:
    """Of the total cost, by group: falling linearly."""
    return [(2 * (groups - k) - 1) / groups**2 for k in range(groups)]


@given(costs=st.lists(st.floats(1e-6, 1e6), max_size=200), groups=st.integers(1, 20))
def test_tapered_keeps_order_and_bounds_every_group(costs: list[float], groups: int) -> None:
    runs = tapered(costs, groups)
    assert [position for run in runs for position in run] == list(range(len(costs)))
    assert len(runs) <= groups
    assert all(runs)
    for run, share in zip(runs, shares(groups), strict=False):
        assert sum(costs[i] for i in run) <= sum(costs) * share + max(costs) + 1e-9 * sum(costs)


def test_tapered_gives_each_group_less_than_the_one_before() -> None:
    sizes = [len(run) for run in tapered([0.1] * 10_000, 10)]
    assert sizes == [1900, 1700, 1500, 1300, 1100, 900, 700, 500, 300, 100]


def test_tapered_of_nothing_is_nothing() -> None:
    assert tapered([], 16) == []
