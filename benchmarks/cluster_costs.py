"""What a cluster costs beside the work: real steps on a real scheduler, with next to nothing to compute.

Processor time of client and scheduler is taken for steps of few and many ranges on few and many workers:

    seconds(ranges, workers) = a + b·ranges + c·workers        least squares of relative errors, for each separately
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
from distributed import Client, wait

from benchmarks.measure import Report
from benchmarks.simulation import Costs
from benchmarks.workers import problem_of
from deepzero_core.errors import WorkError
from deepzero_core.training import Batch
from infra.cluster import connect
from infra.forward import DistributedCGE
from infra.problem import Problem
from infra.ranges import tapered

TIMEOUT_S = 120.0
GRID = ((2, 4), (2, 24), (2, 240), (16, 4), (16, 24), (16, 240))
STEPS = 12
_TRANSFER = 32 << 20


def cluster_costs(network: float, report: Report) -> Costs:
    """Measured on this machine; but bytes travel at no more than `network` bytes per second.

    Raises:
        WorkError: no scheduler or workers came up.
    """
    rows: list[tuple[int, int, float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        problem = problem_of(Path(folder) / "store", depth=1, batch=2, size=4, memory=1 << 10)
        for workers in sorted({workers for workers, _ in GRID}):
            with _cluster(workers, Path(folder)) as (client, scheduler):
                report(f"cluster: {workers} workers with nothing to do")
                if workers == min(workers for workers, _ in GRID):
                    round_trip, bandwidth = _round_trip(client), min(network, _bandwidth(client))
                for ranges in (ranges for some, ranges in GRID if some == workers):
                    rows.append((workers, ranges, *_steps(client, scheduler, problem, ranges)))
    client_fit, scheduler_fit = _fit(rows, 2), _fit(rows, 3)
    return Costs(
        step=max(0.0, client_fit[0]) + max(0.0, scheduler_fit[0]),
        client_task=client_fit[1],
        coordinator_task=scheduler_fit[1],
        coordinator_worker=max(0.0, scheduler_fit[2]),
        round_trip=round_trip,
        bandwidth=bandwidth,
    )


def _steps(client: Client, scheduler: psutil.Process, problem: Problem, ranges: int) -> tuple[float, float, float]:
    """Seconds of a step: processor time of the client and of the scheduler; by the clock, for the record."""
    module, batches = problem.build_module().train(), problem.build_batches()
    step = Batch.of(0, 0, 0, *batches.batch(0, 0))
    with ExitStack() as stack:
        stack.enter_context(patch("infra.forward.grouped", lambda costs, workers: tapered(costs, ranges)))
        source = stack.enter_context(DistributedCGE(client, problem, TIMEOUT_S, lanes=False))
        for _ in range(3):
            source.estimate(module, step, None)
        mine, its, began = time.process_time(), _cpu(scheduler), time.perf_counter()
        for _ in range(STEPS):
            source.estimate(module, step, None)
        spent = time.process_time() - mine, _cpu(scheduler) - its, time.perf_counter() - began
    client_s, scheduler_s, wall = (seconds / STEPS for seconds in spent)
    return client_s, scheduler_s, wall


def _fit(rows: Sequence[tuple[int, int, float, float, float]], column: int) -> tuple[float, float, float]:
    """a, b, c of a + b·ranges + c·workers."""
    measured = np.array([row[column] for row in rows])
    matrix = np.array([[1.0, ranges, workers] for workers, ranges, *_ in rows]) / measured[:, np.newaxis]
    a, b, c = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)[0].tolist()
    return a, b, c


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _round_trip(client: Client) -> float:
    """Between scheduler and worker: a message to a worker and back passes the scheduler on both ways."""
    worker = next(iter(client.nthreads()))
    times = []
    for _ in range(50):
        began = time.perf_counter()
        client.run(int, workers=[worker])
        times.append(time.perf_counter() - began)
    return statistics.median(times) / 2


def _bandwidth(client: Client) -> float:
    """Bytes per second from one worker to another."""
    first, second = list(client.nthreads())[:2]

    times = []
    for _ in range(5):
        data = client.submit(bytes, _TRANSFER, workers=[first], pure=False)
        wait([data], timeout=TIMEOUT_S)
        began = time.perf_counter()
        client.submit(len, data, workers=[second], pure=False).result(timeout=TIMEOUT_S)
        times.append(time.perf_counter() - began)
    return _TRANSFER / statistics.median(times)


@contextmanager
def _cluster(workers: int, folder: Path) -> Iterator[tuple[Client, psutil.Process]]:
    """A scheduler and workers in processes of their own; the client, and the scheduler's process."""
    file = folder / f"scheduler-{workers}.json"
    with ExitStack() as stack:
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
        scheduler = stack.enter_context(_process("distributed.cli.dask_scheduler", *options))
        deadline = time.monotonic() + TIMEOUT_S
        while not file.exists() or not file.read_text():
            if scheduler.poll() is not None or time.monotonic() > deadline:
                raise WorkError("the Dask scheduler of the benchmark did not start")
            time.sleep(0.1)
        address = _address(file)
        for _ in range(2):
            stack.enter_context(_process("benchmarks.workers_in_one", address, str(workers // 2)))
        client = stack.enter_context(connect(workers, address, TIMEOUT_S))
        yield client, psutil.Process(scheduler.pid)


def _address(file: Path) -> str:
    return str(json.loads(file.read_text())["address"])


@contextmanager
def _process(module: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=quiet, stderr=quiet)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)
