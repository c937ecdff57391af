"""A slow program on one Dask worker and on two, beside the same program asked from this process."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Report
from deepzero_core.errors import WorkError
from infra.cluster import connect
from infra.fan_out import FanOut
from simulators.own import own_simulator
from simulators.protocol import Simulator
from simulators.shared_out import SharedOut

WORKERS = (0, 1, 2)
SIMULATIONS = 96
"""Of a step: a batch of 4 with 24 changed weights."""
EACH_S = 0.02

_PROGRAM = """
import sys, time
ask, answer = sys.stdin.buffer, sys.stdout.buffer
while ask.readline():
    head = ask.readline()
    count, cells = map(int, head.split()[3:])
    data = ask.read(8 * count * cells)
    {work}
    answer.write(b"done 1\\n" + head + data)
    answer.flush()
"""
CASES = {
    "computing": "end = time.process_time() + count * {seconds}\n    while time.process_time() < end: pass",
    "waiting": "time.sleep(count * {seconds})",
}
"""A program that needs a core, and one that waits for something else."""


@dataclass(frozen=True)
class Shared:
    """Seconds of a step of `SIMULATIONS`, by the number of workers, 0 being this process. Medians of n turns."""

    case: str
    turns: int
    seconds: dict[int, float]

    @property
    def ratios(self) -> dict[int, float]:
        """How many times faster than one worker."""
        return {workers: self.seconds[1] / seconds for workers, seconds in self.seconds.items()}


def measure(cases: Sequence[str], repeats: int, report: Report) -> list[Shared]:
    """In turns: whatever else runs on the machine is shared by all. WorkError: the bits are not the same."""
    return [_measured(name, repeats, report) for name in cases]


def _measured(name: str, repeats: int, report: Report) -> Shared:
    script = _PROGRAM.format(work=CASES[name].format(seconds=EACH_S))
    settings = {"command": [sys.executable, "-S", "-c", script], "state_shapes": {"u": [64]}}
    state = {"u": torch.randn(SIMULATIONS, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    times: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for turn in range(repeats):
        for workers in WORKERS:
            report(f"{name}: turn {turn + 1} of {repeats}, workers: {workers}")
            with _simulator(settings, workers) as simulator:
                simulator.step(state, {})  # programs are started
                started = time.perf_counter()
                after = simulator.step(state, {})
                times[workers].append(time.perf_counter() - started)
                if not torch.equal(after["u"], state["u"]):
                    raise WorkError(f"{workers} workers gave other bits")
    return Shared(name, repeats, {workers: median(seconds) for workers, seconds in times.items()})


@contextmanager
def _simulator(settings: dict[str, Any], workers: int) -> Iterator[Simulator]:
    own = own_simulator("external", settings)
    if workers == 0:
        try:
            yield own
        finally:
            own.close()
        return
    arguments = {"kind": "external", "settings": settings}
    with (
        connect(workers, None, 120.0) as client,
        FanOut(client, "simulators.shared_out:Member", arguments) as members,
    ):
        yield SharedOut(own, members.ask)


def show(found: Sequence[Shared]) -> None:
    table = Table(box=box.SIMPLE, title=f"seconds for a step of {SIMULATIONS} simulations of {1e3 * EACH_S:g} ms each")
    table.add_column("case")
    for title in ("this process", "1 worker", "2 workers", "2 workers beside 1"):
        table.add_column(title, justify="right")
    for shared in found:
        times = [f"{seconds:.3g}" for seconds in shared.seconds.values()]
        table.add_row(shared.case, *times, f"{shared.ratios[2]:.2f}×")
    Console(width=140).print(table)
