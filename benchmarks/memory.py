"""Peak resident memory of an estimate beside that of a plain forward pass, each in a process of its own."""

import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.bars import MEMORY
from benchmarks.cases import CASES
from benchmarks.measure import Report
from deepzero_core import cge
from deepzero_core.estimators.cge import DEFAULT_MEMORY
from deepzero_core.perturb import prepare
from deepzero_core.perturb.objective import state_of

GIB = 1 << 30
_LIMIT_S = 3600
"""For one process: a chunk of every parameter takes minutes at most."""


@dataclass(frozen=True)
class Peaks:
    """Bytes: of one forward pass, and of it and an estimate behind it."""

    case: str
    forward: int
    engine: int

    @property
    def beside(self) -> float:
        """GiB that the estimate adds."""
        return (self.engine - self.forward) / GIB


def measure(cases: Sequence[str], threads: int, report: Report) -> list[Peaks]:
    """One chunk of every parameter's coordinates is estimated: what a longer estimate holds at a time."""
    found = []
    for case in cases:
        report(f"{case}: peak memory")
        found.append(Peaks(case, *(_apart(case, threads, engine) for engine in (False, True))))
    return found


def show(found: Sequence[Peaks]) -> None:
    table = Table(box=box.SIMPLE)
    for title in ("case", "forward pass, GiB", "estimate beside it, GiB", "bar"):
        table.add_column(title, justify="left" if title == "case" else "right")
    for peaks in found:
        beside = peaks.beside
        table.add_row(peaks.case, f"{peaks.forward / GIB:.2f}", f"{beside:.2f}", MEMORY.verdict(beside))
    Console(width=120).print(table)


def _apart(case: str, threads: int, engine: bool) -> int:
    program = f"from benchmarks.memory import peak; print(peak({case!r}, {threads}, {engine}))"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=_LIMIT_S)
    return int(run.stdout)


def peak(name: str, threads: int, engine: bool) -> int:
    """Bytes that this process has held at most, after a forward pass of a case and, if asked for, an estimate."""
    torch.set_num_threads(threads)
    case = CASES[name]
    problem = case.build()
    with torch.no_grad():
        problem.module(problem.inputs)
    if engine:
        what = problem.module, problem.inputs, problem.targets, problem.loss_fn
        evaluator = prepare(*what)
        base = evaluator.base(*state_of(problem.module), problem.inputs, problem.targets)
        chunks = {
            parameter: indices[: evaluator.chunk_size(base, parameter, DEFAULT_MEMORY)]
            for parameter, indices in case.coordinates(problem.module).items()
        }
        del base
        cge(*what, coordinates=chunks, evaluator=evaluator)
    return _most_held()


def _most_held() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would count what the parent held when it started this process
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
