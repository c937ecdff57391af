"""What is done to a run, one function per row of the table. Each returns the home and the processes that spoke.

A case asserts what has to be seen on the way: that the run noticed, said so in a sentence, or went on. What was lost is
judged afterwards, the same for all (`verdict`).
"""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.faults.bench import Bench
from benchmarks.faults.processes import (
    Home,
    Process,
    dask_scheduler,
    dask_worker,
    mlflow_server,
    prefect_server,
    workers_of,
)
from benchmarks.faults.verdict import STEPS

Outcome = tuple[Home, list[Process]]


class Skipped(Exception):  # noqa: N818 - not an error
    """This machine does not allow what the case does."""


ALONE = ("--set", "cluster.workers=0")


@dataclass(frozen=True)
class Case:
    """One row. about: what is done; expected: what the user sees."""

    name: str
    about: str
    expected: str
    inject: Callable[[Bench, random.Random], Outcome]


CASES: dict[str, Case] = {}


def case(
    name: str, about: str, expected: str
) -> Callable[[Callable[[Bench, random.Random], Outcome]], Callable[[Bench, random.Random], Outcome]]:
    """Register a case."""

    def register(inject: Callable[[Bench, random.Random], Outcome]) -> Callable[[Bench, random.Random], Outcome]:
        if name in CASES:
            raise ValueError(f"there are two cases {name!r}")
        CASES[name] = Case(name, about, expected, inject)
        return inject

    return register


def somewhere(draw: random.Random, first: int = 4, last: int = STEPS - 16) -> int:
    """A step in the middle."""
    return draw.randint(first, last)


@case("worker", "SIGKILL of a Dask worker", "a warning; the run goes on")
def worker(bench: Bench, draw: random.Random) -> Outcome:
    home = bench.home()
    run = home.start(*bench.run)
    home.wait_for_step(run, somewhere(draw))
    draw.choice(workers_of(run)).kill()
    assert run.wait() == 0, run.errors
    assert "was lost: its coordinate ranges" in run.errors
    return home, [run]


@case("workers", "SIGKILL of all Dask workers at once", "a warning for each; the run goes on with new ones")
def workers(bench: Bench, draw: random.Random) -> Outcome:
    home = bench.home()
    run = home.start(*bench.run)
    home.wait_for_step(run, somewhere(draw))
    for victim in workers_of(run):
        victim.kill()
    assert run.wait() == 0, run.errors
    assert run.errors.count("was lost: its coordinate ranges") >= 2
    return home, [run]


@case(
    "scheduler",
    "SIGKILL of the Dask scheduler of another process",
    "exit 1 with a sentence and a checkpoint; the same command goes on",
)
def scheduler(bench: Bench, draw: random.Random) -> Outcome:
    home, folder = bench.home(), bench.place("dask")
    server, address = dask_scheduler(folder)
    bench.started(server)
    helpers = [bench.started(dask_worker(folder, address, number)) for number in range(2)]
    arguments = (*bench.run, "--set", f"cluster.address={address}")
    first = home.start(*arguments)
    home.wait_for_step(first, somewhere(draw))
    server.kill()
    assert first.wait() == 1, first.errors
    lost = r"^error: the Dask scheduler at \S+ was lost in the middle of a step; train cge stands at step \d+ of"
    assert re.search(lost, first.errors, re.M), first.errors
    for helper in helpers:
        helper.kill()
    server.start()
    helpers = [bench.started(dask_worker(folder, address, number + 2)) for number in range(2)]
    second = home.start(*arguments)
    assert second.wait() == 0, second.errors
    return home, [first, second]


@case("flow", "SIGKILL of the flow process and all that it started", "the same command goes on from a checkpoint")
def flow(bench: Bench, draw: random.Random) -> Outcome:
    home = bench.home()
    first = home.start(*bench.run)
    home.wait_for_step(first, somewhere(draw))
    time.sleep(draw.uniform(0, 0.3))
    first.kill()
    second = home.start(*bench.run)
    assert second.wait() == 0, second.errors
    return home, [first, second]


@case(
    "checkpoint",
    "SIGKILL of the flow process, and its newest checkpoint damaged at a random byte",
    "a warning that names it; the run goes on from the one before",
)
def checkpoint(bench: Bench, draw: random.Random) -> Outcome:
    home = bench.home()
    first = home.start(*bench.run, *ALONE)
    home.wait_for_step(first, somewhere(draw))
    first.kill()
    newest = home.checkpoints()[0]
    content = bytearray(newest.read_bytes())
    content[draw.randrange(len(content))] ^= draw.randint(1, 255)
    newest.write_bytes(content)
    second = home.start(*bench.run, *ALONE)
    assert second.wait() == 0, second.errors
    assert re.search(rf"^warning: .*{newest.name}.*; using an older one$", second.errors, re.M), second.errors
    return home, [first, second]


@case("prefect", "SIGKILL of the Prefect server, started again 3 s later", "the run goes on")
def prefect(bench: Bench, draw: random.Random) -> Outcome:
    server, address = prefect_server(bench.place("prefect"))
    bench.started(server)
    home = bench.home(prefect=address)
    run = home.start(*bench.run, *ALONE)
    home.wait_for_step(run, somewhere(draw))
    server.kill()
    time.sleep(3)
    server.start()
    assert run.wait() == 0, run.errors
    return home, [run]


@case("mlflow", "SIGKILL of the MLflow server, started again 3 s later", "a warning when it goes and when it is back")
def mlflow(bench: Bench, draw: random.Random) -> Outcome:
    server, address = mlflow_server(bench.place("mlflow"))
    bench.started(server)
    home = bench.home(store=address)
    run = home.start(*bench.run, *ALONE)
    home.wait_for_step(run, somewhere(draw))
    server.kill()
    threading.Timer(3, server.start).start()
    assert run.wait() == 0, run.errors
    assert "MLflow does not answer" in run.errors
    return home, [run]


@case(
    "mlflow-away",
    "SIGKILL of the MLflow server, which stays away until after the end of the run",
    "two warnings; `deepzero deliver` makes up for it",
)
def mlflow_away(bench: Bench, draw: random.Random) -> Outcome:
    server, address = mlflow_server(bench.place("mlflow"))
    bench.started(server)
    home = bench.home(store=address, DEEPZERO_MLFLOW_WAIT_S="1")
    run = home.start(*bench.run, *ALONE)
    home.wait_for_step(run, somewhere(draw))
    server.kill()
    assert run.wait() == 0, run.errors
    assert "MLflow does not answer" in run.errors and "`deepzero deliver`" in run.errors, run.errors
    server.start()
    late = home.done("deliver")
    assert re.search(r"^MLflow has been told about \d+ runs$", late.said, re.M), late.said
    assert not list(home.path.glob("spool/*")), "nothing is left of what has been delivered"
    return home, [run, late]


@case(
    "mlflow-and-flow",
    "SIGKILL of the MLflow server, then of the flow process while it is away",
    "the next run delivers what the killed one had to say, and goes on",
)
def mlflow_and_flow(bench: Bench, draw: random.Random) -> Outcome:
    server, address = mlflow_server(bench.place("mlflow"))
    bench.started(server)
    home = bench.home(store=address)
    first = home.start(*bench.run, *ALONE)
    home.wait_for_step(first, somewhere(draw, last=10))
    server.kill()
    home.wait_for_step(first, somewhere(draw, first=14))
    first.kill()
    seen = home.history()[-1]["step"]
    server.start()
    second = home.start(*bench.run, *ALONE)
    assert second.wait() == 0, second.errors
    runs = [(run.info.run_name, run.info.status, run.info.run_id) for run in home.runs()]
    killed = [run_id for *which, run_id in runs if which == ["train cge", "KILLED"]]
    assert len(killed) == 1, runs
    told = [point.step for point in home.client().get_metric_history(killed[0], "train/loss")]
    assert told == list(range(1, len(told) + 1)) and len(told) >= seen, (told, seen)
    return home, [first, second]


@case("mlflow-hangs", "SIGSTOP of the MLflow server for 20 s", "a warning; no step waits longer than 10 s")
def mlflow_hangs(bench: Bench, draw: random.Random) -> Outcome:
    server, address = mlflow_server(bench.place("mlflow"))
    bench.started(server)
    home = bench.home(store=address)
    run = home.start(*bench.run, *ALONE)
    home.wait_for_step(run, somewhere(draw, last=10))
    server.send(signal.SIGSTOP)
    threading.Timer(20, server.send, [signal.SIGCONT]).start()
    assert run.wait() == 0, run.errors
    assert "MLflow does not answer" in run.errors
    return home, [run]


@case("sleep", "SIGSTOP of everything for 40 s, with time-outs of 15 s; then SIGCONT", "the run goes on")
def sleep(bench: Bench, draw: random.Random) -> Outcome:
    home = bench.home()
    run = home.start(*bench.run, "--set", "cluster.timeout_s=15")
    home.wait_for_step(run, somewhere(draw))
    run.send(signal.SIGSTOP)
    time.sleep(40)
    run.send(signal.SIGCONT)
    assert run.wait() == 0, run.errors
    return home, [run]


@case(
    "disk",
    "the disk is full while a checkpoint is written",
    "exit 1 with a sentence, earlier checkpoints intact; with room again the same command goes on",
)
def disk(bench: Bench, draw: random.Random) -> Outcome:
    """The folder of the stages is a file system of its own, in memory, that holds the data of one checkpoint and a half
    beside what else lies there; then it is made larger."""
    if not can_mount():
        raise Skipped("a file system in memory needs the right to mount one (user namespaces)")
    home = bench.home()
    room = draw.randint(560, 760)
    stages, kept = home.path / "stages", home.path / "kept"
    stages.mkdir()
    command = shlex.join([sys.executable, "-m", "flows.cli", *bench.run, *ALONE])
    script = (
        f"mount -t tmpfs -o size={room}k tmpfs {stages}; {command}; echo status $?; ls -R {stages} >&2; "
        f"mount -o remount,size=64m {stages}; {command}; status=$?; cp -a {stages} {kept}; exit $status"
    )
    run = home.start_as("unshare", "-Urm", "sh", "-c", script)
    assert run.wait() == 0, run.errors
    assert re.search(r"^status 1$", run.said, re.M), run.said
    assert re.search(r"^error: .*: No space left on device", run.errors, re.M), run.errors
    stages.rmdir()
    kept.rename(stages)
    return home, [run]


@case("clock", "the clock of every process jumps by up to a day, forwards or back", "the run goes on")
def clock(bench: Bench, draw: random.Random) -> Outcome:
    home, folder = bench.home(), bench.place("clock")
    jump = draw.choice([-1, 1]) * draw.uniform(3600, 86400)
    # Every Python process imports this at its start: time.time is then a clock that jumps when the file appears.
    (folder / "sitecustomize.py").write_text(
        "import os, time\n"
        "_true, _file = time.time, os.path.join(os.path.dirname(__file__), 'jumped')\n"
        f"time.time = lambda: _true() + ({jump} if os.path.exists(_file) else 0.0)\n"
    )
    home.variables["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    run = home.start(*bench.run)
    home.wait_for_step(run, somewhere(draw))
    (folder / "jumped").touch()
    assert run.wait() == 0, run.errors
    return home, [run]


@case("twice", "two identical runs started at once", "the second waits for each stage of the first, and skips it")
def twice(bench: Bench, draw: random.Random) -> Outcome:
    home = bench.home()
    both = [home.start(*bench.run, *ALONE)]
    time.sleep(draw.uniform(0, 1))
    both.append(home.start(*bench.run, *ALONE))
    assert [run.wait() for run in both] == [0, 0], [run.errors for run in both]
    lines = [line for run in both for line in run.said.splitlines()]
    for stage in ("prune", "train cge", "evaluate cge"):
        assert sum(bool(re.match(rf"{stage} +done in", line)) for line in lines) == 1, stage
        assert sum(bool(re.match(rf"{stage} +unchanged, skipped", line)) for line in lines) == 1, stage
    return home, both


def can_mount() -> bool:
    """Whether this user may mount a file system in memory, in a name space of its own."""
    try:
        probe = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
        return subprocess.run(probe, capture_output=True, check=False, timeout=30).returncode == 0
    except OSError:
        return False
