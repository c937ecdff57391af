"""A program of one's own on real Dask workers: a process on each, the same bits on any number, also when they die."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from distributed import Client
from torch import nn

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.training import Batch, GradientSource
from infra.cluster import connect
from infra.fan_out import FanOut
from simulators import examples
from simulators.cases import Case
from simulators.external import ExternalProgram
from simulators.methods import FieldCoupling, Loop, SplitLoop, Windows, ZerothOrderLoop
from simulators.own import own_simulator
from simulators.protocol import Simulator, alive
from simulators.shared_out import SharedOut

CELLS = 24
SHAPES = {"velocity": [CELLS]}


@pytest.fixture(scope="module")
def burgers1d(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = tmp_path_factory.mktemp("program") / "burgers1d"
    source = Path(examples.__file__).parent / "burgers1d.c"
    subprocess.run([compiler, "-O2", "-o", str(program), str(source), "-lm"], check=True, timeout=60)
    return str(program)


@pytest.fixture(scope="module")
def two() -> Iterator[Client]:
    with connect(2, None, 60) as client:
        yield client


@contextmanager
def shared_out(client: Client, settings: dict[str, Any], kind: str = "external") -> Iterator[SharedOut]:
    arguments = {"kind": kind, "settings": settings}
    with FanOut(client, "simulators.shared_out:Member", arguments) as members:
        yield SharedOut(own_simulator(kind, settings), members.ask)


@contextmanager
def here(settings: dict[str, Any], kind: str = "external") -> Iterator[Simulator]:
    simulator = own_simulator(kind, settings)
    try:
        yield simulator
    finally:
        simulator.close()


def velocity(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"velocity": 0.5 * torch.randn(count, CELLS, generator=generator, dtype=torch.float64)}


def case(program: str) -> Case:
    """A reference with less viscosity."""
    with here({"command": [program, "0.02", "0.1"], "state_shapes": SHAPES}) as fine:
        frames = [velocity(1)]
        for _ in range(11):
            frames.append(fine.step(frames[-1], {}))
    return Case("fine", {"velocity": torch.cat([frame["velocity"] for frame in frames])}, {})


def zeroth_order(loop: Loop) -> GradientSource:
    return ZerothOrderLoop(loop, mu=1e-6)


def split(loop: Loop) -> GradientSource:
    return SplitLoop(loop, queries=13, seed=0)


def trained(
    simulator: Simulator, reference: Case, source_of: Callable[[Loop], GradientSource], steps: int
) -> tuple[torch.Tensor, list[float]]:
    """The weights of a small corrector after some steps in the loop, and the losses."""
    loop = Loop(simulator, FieldCoupling("velocity"), steps=3)
    source, batch = source_of(loop), Windows(loop, [reference]).batch([0, 2, 4, 6, 8])
    torch.manual_seed(0)
    corrector = nn.Sequential(
        nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv1d(2, 1, 3, padding=1)
    ).double()
    optimizer, losses = torch.optim.Adam(corrector.parameters(), lr=0.01), []
    for number in range(steps):
        estimate = source.estimate(corrector, Batch.of(number, 0, number, *batch), None)
        for name, parameter in corrector.named_parameters():
            parameter.grad = estimate.gradients[name]
        optimizer.step()
        losses.append(estimate.loss)
    return nn.utils.parameters_to_vector(corrector.parameters()).detach(), losses


@pytest.mark.parametrize("source_of", [zeroth_order, split])
def test_a_corrector_is_trained_through_programs_on_workers_to_the_same_bits(
    burgers1d: str, two: Client, tmp_path: Path, source_of: Callable[[Loop], GradientSource]
) -> None:
    """No worker, one, two; the program crashes on purpose once, at its fourth question, wherever that is."""
    reference, found = case(burgers1d), {}
    for workers in (0, 1, 2):
        seen = tmp_path / f"crashed-{workers}"
        settings = {
            "command": [burgers1d, "0.4", "0.1", "4"],
            "state_shapes": SHAPES,
            "environment": {"MARK": str(seen)},
        }
        if workers == 1:
            with connect(1, None, 60) as one, shared_out(one, settings) as simulator:
                found[workers] = trained(simulator, reference, source_of, 2)
        else:
            with shared_out(two, settings) if workers else here(settings) as simulator:
                found[workers] = trained(simulator, reference, source_of, 2)
        assert seen.exists()
        statistics = simulator.statistics
        # Two workers may come to their fourth questions at the same moment.
        assert statistics.restarts == 1 or (workers == 2 and statistics.restarts == 2)
        assert (statistics.crashed, statistics.diverged) == (0, 0)
        assert "crashing on purpose" in statistics.last_error
    for weights, losses in (found[1], found[2]):
        assert torch.equal(weights, found[0][0]) and losses == found[0][1]
    assert found[0][1][-1] < found[0][1][0]


def programs_of(client: Client, name: str) -> dict[int, list[int]]:
    """By worker, the processes of a program that it has started."""
    workers = client.run(os.getpid).values()
    return {
        worker: [child.pid for child in psutil.Process(worker).children() if name in child.name()] for worker in workers
    }


def test_every_worker_keeps_a_process_of_its_own_until_the_end(burgers1d: str, two: Client) -> None:
    with shared_out(two, {"command": [burgers1d, "0.1", "0.05"], "state_shapes": SHAPES}) as simulator:
        state = velocity(96)
        state, kept = simulator.step(state, {}), programs_of(two, "burgers1d")
        simulator.step(state, {})
        assert programs_of(two, "burgers1d") == kept
        assert [len(some) for some in kept.values()] == [1, 1]
    gone([process for some in kept.values() for process in some])


def gone(programs: list[int]) -> None:
    """Wait until they have ended; one that nobody has collected yet has ended."""

    def runs(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + 10
    while any(map(runs, programs)):
        assert time.monotonic() < deadline, "a program outlives the block"
        time.sleep(0.02)


SLOW = """
import sys, time
ask, answer = sys.stdin.buffer, sys.stdout.buffer
while ask.readline():
    head = ask.readline()
    count, cells = map(int, head.split()[3:])
    data = ask.read(8 * count * cells)
    time.sleep(0.15)
    answer.write(b"done 1\\n" + head + data)
    answer.flush()
"""


def killed_in_mid_step(client: Client, victim: int) -> threading.Thread:
    """Kill a worker when some ranges of the next step are done and others are not."""

    def done() -> int:
        tasks = client.cluster.scheduler.tasks.items()
        states = [task.state for key, task in tasks if str(key).startswith("deepzero-question")]
        return states.count("memory") if states.count("processing") + states.count("queued") else 0

    def kill() -> None:
        while not done():
            time.sleep(0.005)
        os.kill(victim, signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_a_worker_killed_in_mid_step_changes_no_bit(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"command": [sys.executable, "-S", "-c", SLOW], "state_shapes": SHAPES, "batch_size": 8}
    with (
        caplog.at_level(logging.INFO, "infra"),
        connect(2, None, 60) as client,
        shared_out(client, settings) as simulator,
    ):
        simulator.step(velocity(16), {})
        victim = next(iter(client.run(os.getpid).values()))
        orphans = [child.pid for child in psutil.Process(victim).children()]
        killing = killed_in_mid_step(client, victim)
        after = simulator.step(velocity(80), {})
        killing.join(timeout=1)
        assert not killing.is_alive(), "the worker died during the step"
        assert victim not in client.run(os.getpid).values()
        assert torch.equal(after["velocity"], velocity(80)["velocity"])
        assert (simulator.statistics.steps, simulator.statistics.crashed) == (96, 0)
    gone(orphans)
    warnings = [r.getMessage() for r in caplog.records if r.name == "infra.fan_out" and r.levelno == logging.WARNING]
    assert re.fullmatch(r"Dask worker \S+ was lost: what it was asked is asked of another", "".join(warnings))


def test_workers_that_know_nothing_of_the_run_have_another_scheduler(two: Client) -> None:
    settings = {"command": [sys.executable, "-S", "-c", SLOW], "state_shapes": SHAPES, "batch_size": 8}
    with shared_out(two, settings) as simulator:
        simulator.step(velocity(2), {})
        (plugin,) = [name for name in two.cluster.scheduler.worker_plugins if name.startswith("deepzero-fan-out")]
        two.unregister_worker_plugin(plugin)
        with pytest.raises(WorkError, match=r"^the Dask scheduler was lost in the middle of a step$"):
            simulator.step(velocity(2), {})


def test_a_program_that_hangs_is_a_crash_of_its_range_alone(two: Client) -> None:
    script = SLOW.replace("time.sleep(0.15)", "time.sleep(60 * (data[:8] == bytes(8)))")
    settings = {
        "command": [sys.executable, "-S", "-c", script],
        "state_shapes": SHAPES,
        "batch_size": 2,
        "timeout": 1,
        "retries": 0,
    }
    state = velocity(6)
    state["velocity"][2, 0] = 0  # of the second range
    with shared_out(two, settings) as simulator:
        after = simulator.step(state, {})
    assert alive(after).tolist() == [True, True, False, False, True, True]
    assert simulator.statistics.crashed == 2 and "did not answer in time" in simulator.statistics.last_error


@pytest.mark.parametrize(
    ("command", "sentence"),
    [(["/no/such/program"], "the program '/no/such/program' cannot be started: No such file")],
)
def test_what_cannot_work_is_refused_in_one_sentence(two: Client, command: list[str], sentence: str) -> None:
    with (
        shared_out(two, {"command": command, "state_shapes": SHAPES}) as simulator,
        pytest.raises(RequestError, match=sentence),
    ):
        simulator.step(velocity(8), {})


def test_a_simulator_that_is_shared_out_cannot_be_differentiated(two: Client) -> None:
    simulator = ExternalProgram(["true"], state_shapes={"velocity": (CELLS,)})
    assert not SharedOut(simulator, lambda questions: []).differentiable
