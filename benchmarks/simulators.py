"""Simulations advanced together, timed beside PhiFlow's own step of one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.bars import SIMULATORS
from benchmarks.measure import Report
from simulators import burgers, wake
from simulators.contained import Contained
from simulators.forcing import random_velocity
from simulators.phiflow import flow, run
from simulators.protocol import State

TOGETHER = (1, 16, 256)


@dataclass(frozen=True)
class Speed:
    """Seconds per simulation-step: PhiFlow's eager step of one, and ours of N together, by N. Medians of n turns."""

    case: str
    turns: int
    eager: float
    together: dict[int, float]

    @property
    def ratios(self) -> dict[int, float]:
        return {count: self.eager / seconds for count, seconds in self.together.items()}


@dataclass(frozen=True)
class _Case:
    simulator: Contained
    start: Callable[[int], tuple[State, State]]
    eager: Callable[[State, State], object]


def _wake() -> _Case:
    simulator = wake.Wake()

    def start(count: int) -> tuple[State, State]:
        return simulator.start(count), {"reynolds": torch.linspace(100, 3000, count)}

    def eager(state: State, params: State) -> object:
        return run(_stock_wake_step, state["velocity_y"], state["velocity_x"], params["reynolds"])

    return _Case(simulator, start, eager)


def _stock_wake_step(velocity_y: object, velocity_x: object, reynolds: object) -> Sequence[object]:
    """As a user of PhiFlow writes it: its transport and its `make_incompressible`."""
    phi, grid = flow(), wake.SOURCE
    velocity_y, velocity_x = wake.transport(velocity_y, velocity_x, reynolds, grid=grid, dt=1.0, substeps=1)
    velocity = wake.velocity_field(velocity_y, velocity_x, grid)
    disc = phi.Obstacle(phi.Sphere(y=wake.CENTRE[0], x=wake.CENTRE[1], radius=wake.RADIUS))
    velocity, _ = phi.fluid.make_incompressible(velocity, disc, phi.Solve("CG", 1e-3))
    return velocity.vector["y"].values, velocity.vector["x"].values


def _burgers() -> _Case:
    simulator = burgers.Burgers()

    def start(count: int) -> tuple[State, State]:
        generator = torch.Generator().manual_seed(0)
        velocity = random_velocity(generator, burgers.SOURCE).float().expand(count, -1, -1, -1)
        return {"velocity": velocity.clone()}, {"force": torch.zeros_like(velocity)}

    return _Case(simulator, start, simulator.eager)


CASES: dict[str, Callable[[], _Case]] = {"wake": _wake, "burgers": _burgers}


def measure(cases: Sequence[str], repeats: int, report: Report) -> list[Speed]:
    """Steps of the source grids in float32, in turns: whatever else runs on the machine is shared by all."""
    return [_measured(name, repeats, report) for name in cases if name in CASES]


def _measured(name: str, repeats: int, report: Report) -> Speed:
    case = CASES[name]()
    starts = {count: case.start(count) for count in TOGETHER}
    report(f"{name}: tracing")
    case.eager(*starts[1])
    for state, params in starts.values():
        for _ in range(3):  # torch.jit optimises during the first calls
            case.simulator.step(state, params)
    times: dict[int, list[float]] = {0: [], **{count: [] for count in TOGETHER}}
    for turn in range(repeats):
        report(f"{name}: turn {turn + 1} of {repeats}")
        times[0].append(_seconds(case.eager, *starts[1]))
        for count, start in starts.items():
            times[count].append(_seconds(case.simulator.step, *start) / count)
    medians = {count: median(seconds) for count, seconds in times.items()}
    return Speed(name, repeats, medians.pop(0), medians)


def _seconds(step: Callable[[State, State], object], state: State, params: State) -> float:
    started = time.perf_counter()
    step(state, params)
    return time.perf_counter() - started


def show(speeds: Sequence[Speed]) -> None:
    table = Table(box=box.SIMPLE, title="milliseconds for a step of one simulation")
    table.add_column("case")
    for title in ("PhiFlow, eager, 1", *(f"{count} together" for count in TOGETHER), "ratio at the most", "bar"):
        table.add_column(title, justify="right")
    for speed in speeds:
        ratio = speed.ratios[TOGETHER[-1]]
        times = [f"{1e3 * seconds:.3g}" for seconds in (speed.eager, *speed.together.values())]
        table.add_row(speed.case, *times, f"{ratio:.0f}×", SIMULATORS.verdict(ratio))
    Console(width=140).print(table)
