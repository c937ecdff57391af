"""An hour of training in a flow, with Dask workers and MLflow: the memory of every process, which has to stay flat.

The network is small and a step short, so that an hour holds as many steps as a weekend of a large one: what leaks,
leaks per step. The first fifth is warm-up: caches fill, the allocator finds its size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.orchestration import in_flow
from configs.schema import Experiment

SAMPLES = 200
"""Readings of the memory in the whole time."""
BAR = 0.02
"""Growth that is still called flat: this share of the memory from the end of the warm-up to the end."""
_WARM_UP = 0.2
_MIB = 2**20


@dataclass(frozen=True)
class Reading:
    """step and seconds of the training; resident memory in MiB by process."""

    step: int
    seconds: float
    memory: dict[str, float]


@dataclass(frozen=True)
class Soak:
    minutes: float
    steps: int
    readings: list[Reading]

    @property
    def growth(self) -> dict[str, float]:
        """By process, what a straight line through the readings after the warm-up gains, as a share of its start."""
        kept = self.readings[int(len(self.readings) * _WARM_UP) :]
        found = {}
        for name in kept[0].memory if kept else ():
            points = [(reading.seconds, reading.memory[name]) for reading in kept if name in reading.memory]
            if len(points) < 5:
                continue
            seconds, memory = np.array(points).T
            slope, start = np.polyfit(seconds - seconds[0], memory, 1)
            found[name] = float(slope * (seconds[-1] - seconds[0]) / start)
        return found

    @property
    def flat(self) -> bool:
        return all(share <= BAR for share in self.growth.values())


def measure(minutes: float, report: Callable[[str], None]) -> Soak:
    """Train for so many minutes; below a home and a Prefect folder that the caller has set up."""
    readings: list[Reading] = []

    def watched(records: Iterator[Any]) -> Iterator[Any]:
        processes = _named()
        started = time.monotonic()
        every, due = minutes * 60 / SAMPLES, 0.0
        for record in records:
            yield record
            seconds = time.monotonic() - started
            if seconds >= due:
                due += every
                readings.append(Reading(record.step, seconds, _memory(processes)))
                if len(readings) % 20 == 1:
                    said = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in readings[-1].memory.items())
                    report(f"step {record.step:,}: {said}")
            if seconds > minutes * 60:
                return

    in_flow(_experiment(), watched)
    return Soak(minutes, readings[-1].step, readings)


def _experiment() -> Experiment:
    return Experiment.model_validate(
        {
            "name": "soak",
            "data": {"name": "digits", "batch_size": 32, "train_limit": 320, "test_limit": 32, "crop_padding": 1},
            "model": {"name": "cnn", "depth": 2, "width": 4},
            "pruning": {"method": "random", "sparsity": 0.8},
            "training": {"epochs": 10**6, "evaluate_every": 50, "schedule": {"name": "constant", "warmup_epochs": 0}},
            "cluster": {"workers": 2},
        }
    )


def _named() -> dict[str, psutil.Process]:
    """This process, and those that it has started, by what they are."""
    found = {"flow": psutil.Process()}
    counts: dict[str, int] = {}
    for child in psutil.Process().children(recursive=True):
        line = " ".join(child.cmdline())
        kind = "Prefect server" if "prefect" in line else "Dask worker" if "spawn_main" in line else ""
        if kind:
            counts[kind] = counts.get(kind, 0) + 1
            found[f"{kind} {counts[kind]}" if kind == "Dask worker" else kind] = child
    return found


def _memory(processes: dict[str, psutil.Process]) -> dict[str, float]:
    found = {}
    for name, process in processes.items():
        with suppress(psutil.Error):
            found[name] = process.memory_info().rss / _MIB
    return found


def show(soak: Soak) -> None:
    """Memory at ten moments, and the growth."""
    table = Table(box=box.SIMPLE_HEAD)
    names = list(soak.readings[0].memory)
    for column in ("minute", "step", *(f"{name}, MiB" for name in names)):
        table.add_column(column, justify="right")
    last = len(soak.readings) - 1
    for reading in [soak.readings[round(last * tenth / 10)] for tenth in range(11)]:
        memory = (f"{reading.memory.get(name, float('nan')):.1f}" for name in names)
        table.add_row(f"{reading.seconds / 60:.1f}", f"{reading.step:,}", *memory)
    growth = (f"{soak.growth.get(name, float('nan')):+.1%}" for name in names)
    table.add_row("growth", "", *growth)
    Console(width=120).print(table)
    print(f"{soak.steps:,} steps in {soak.minutes:g} minutes; growth after the first fifth, bar {BAR:.0%}")


def draw(soak: Soak, path: Path) -> None:
    """Memory by step, one line per process; PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        steps: Sequence[int] = [reading.step for reading in soak.readings]
        for name in soak.readings[0].memory:
            axes.plot(steps, [reading.memory.get(name, np.nan) for reading in soak.readings], label=name)
        axes.set(xlabel="step", ylabel="resident memory, MiB", ylim=(0, None))
        axes.set_title(f"{soak.minutes:g} minutes of training", fontweight="bold")
        axes.grid(color="#E3E6EA", linewidth=0.8)
        axes.legend(frameon=False)
        figure.savefig(path)


def document(soak: Soak) -> dict[str, Any]:
    return asdict(soak) | {"growth": soak.growth, "bar": BAR, "flat": soak.flat}
