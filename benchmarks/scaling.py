"""How long a step takes on 1 … 1,024 workers: simulated from costs that are measured here, and held against real steps.

| case | network | coordinates |
|---|---|---|
| `demo` | the CNN of the preset `demo`, batch 64 | those of a mask at its sparsity, 80 % |
| `cnn5` | the paper's CNN of five blocks, batch 128 | all |
| `resnet20` | ResNet-20, batch 64 | those of a mask at ZO-GraSP's ratios for 90 % |

`before` is how ranges were handed out at first: 24 of them, θ fetched by all workers from one.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks import ratios
from benchmarks.cluster_costs import cluster_costs
from benchmarks.measure import Report
from benchmarks.simulation import Costs, Load, Step, saturation, simulate
from benchmarks.workers import problem_of
from configs import load
from deepzero_core import draw_masks
from deepzero_core.data import prepare
from deepzero_core.estimators.cge import slope
from deepzero_core.perturb import Chunk
from deepzero_core.perturb import prepare as prepare_evaluator
from deepzero_core.perturb.coordinates import resolve
from deepzero_core.perturb.evaluator import chunks
from deepzero_core.perturb.objective import state_of
from deepzero_core.sparsity import maskable_parameters
from deepzero_core.training import Batch
from infra.cluster import connect
from infra.forward import DistributedCGE
from infra.problem import Problem
from infra.ranges import ENOUGH, copies_for, grouped, tapered
from tasks.problem import problem_of as problem_of_experiment
from tasks.records import Prepared

WORKERS = tuple(2**power for power in range(11))
NETWORK = 1.25e9
"""Bytes per second between two machines: 10 Gbit/s."""
REAL = {"demo": (1, 2), "cnn5": (1, 2), "resnet20": ()}
"""Numbers of real workers that a prediction is held against; a step of ResNet-20 takes minutes."""
_TIMEOUT_S = 600.0
_TIMED_CHUNKS = 2


@dataclass(frozen=True)
class Scene:
    """A problem as a run hands it to workers, and the coordinates of a step."""

    about: str
    problem: Problem
    coordinates: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Measured:
    """Seconds of the base pass and of every chunk, in order; bytes of θ."""

    base: float
    chunks: tuple[float, ...]
    theta: int

    def load(self, groups: Sequence[Sequence[int]]) -> Load:
        return Load(tuple(sum(self.chunks[i] for i in group) for group in groups), self.base, self.theta)

    def after(self, costs: Costs, workers: int) -> Step:
        """As ranges are handed out."""
        groups = grouped(self.chunks, workers)
        copies = copies_for(min(workers, len(groups)), self.theta)
        return simulate(self.load(groups), costs, workers, copies=copies)

    def before(self, costs: Costs, workers: int) -> Step:
        """As they were."""
        return simulate(self.load(tapered(self.chunks, ENOUGH)), costs, workers)


@dataclass(frozen=True)
class Scaling:
    """Of one case: simulated steps by number of workers, and the medians of real ones."""

    case: str
    about: str
    measured: Measured
    after: dict[int, Step]
    before: dict[int, Step]
    real: dict[int, float]

    @property
    def saturates_at(self) -> int:
        return saturation([(workers, step.seconds) for workers, step in self.after.items()])


def _demo(folder: Path) -> Scene:
    experiment = load("demo")
    prepared = Prepared.of_store(prepare(experiment.data.name, home=folder).path)
    problem = problem_of_experiment(experiment, prepared)
    module = problem.build_module()
    shares = dict.fromkeys(maskable_parameters(module), experiment.pruning.sparsity)
    return Scene("CNN of the demo, 80 %", problem, draw_masks(shares, module, torch.Generator().manual_seed(0)))


def _cnn5(folder: Path) -> Scene:
    return Scene("CNN depth 5, dense", problem_of(folder / "images", 5, 128, 32), None)


def _resnet20(folder: Path) -> Scene:
    problem = problem_of(folder / "images", 5, 64, 32, name="resnet20")
    return Scene("ResNet-20, 90 %", problem, ratios.coordinates(problem.build_module(), 0.9))


CASES: dict[str, Callable[[Path], Scene]] = {"demo": _demo, "cnn5": _cnn5, "resnet20": _resnet20}


def measure(
    cases: Sequence[str], repeats: int, network: float, report: Report
) -> Iterator[tuple[Costs, list[Scaling]]]:
    """Costs of a cluster, and the cases so far on every number of workers; again after every case."""
    torch.set_num_threads(1)  # as workers have
    costs = cluster_costs(network, report)
    found = []
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            scene = CASES[name](Path(folder))
            measured = work_of(scene, lambda line, name=name: report(f"{name}: {line}"))
            after = {workers: measured.after(costs, workers) for workers in WORKERS}
            before = {workers: measured.before(costs, workers) for workers in WORKERS}
            real = {workers: _real(scene, workers, repeats, report, name) for workers in REAL[name]}
            found.append(Scaling(name, scene.about, measured, after, before, real))
            yield costs, found


def work_of(scene: Scene, report: Report) -> Measured:
    """Time every parameter's chunks on one thread: some of them, warm, for all."""
    problem = scene.problem
    module, (inputs, targets) = problem.build_module().train(), problem.build_batches().batch(0, 0)
    report("tracing")
    evaluator = prepare_evaluator(module, inputs, targets, F.cross_entropy)
    parameters, buffers = state_of(module)
    evaluator.base(parameters, buffers, inputs, targets)
    began = time.perf_counter()
    base = evaluator.base(parameters, buffers, inputs, targets)
    base_s = time.perf_counter() - began
    chosen = resolve(module, scene.coordinates)
    parts = list(chunks(evaluator, base, chosen, problem.memory))

    def seconds(chunk: Chunk) -> float:
        began = time.perf_counter()
        slope(evaluator, base, chunk, problem.mu, problem.difference, problem.precision)
        return time.perf_counter() - began

    each = {}
    for position, name in enumerate(chosen):
        report(f"timing parameter {position + 1} of {len(chosen)}")
        mine = [chunk for chunk in parts if chunk.name == name]
        if not mine:
            continue
        seconds(mine[0])
        some = mine[:: max(1, len(mine) // _TIMED_CHUNKS)][:_TIMED_CHUNKS]
        each[name] = sum(seconds(chunk) for chunk in some) / sum(len(chunk.indices) for chunk in some)
    theta = sum(value.nbytes for value in (*parameters.values(), *buffers.values()))
    return Measured(
        base_s,
        tuple(each[chunk.name] * len(chunk.indices) for chunk in parts),
        theta,
    )


def _real(scene: Scene, workers: int, repeats: int, report: Report, name: str) -> float:
    """Median seconds of a step on so many processes of this machine."""
    problem = scene.problem
    module = problem.build_module().train()
    step = Batch.of(0, 0, 0, *problem.build_batches().batch(0, 0))
    with (
        connect(workers, None, _TIMEOUT_S) as client,
        DistributedCGE(client, problem, _TIMEOUT_S, lanes=False) as source,
    ):
        times = []
        for repeat in range(repeats + 2):
            report(f"{name}: {workers} real workers, step {repeat + 1} of {repeats + 2}")
            began = time.perf_counter()
            source.estimate(module, step, scene.coordinates)
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def document(costs: Costs, found: Sequence[Scaling]) -> dict[str, Any]:
    """As JSON's types."""
    cases = []
    for one in found:
        steps = {
            key: {str(workers): vars(step) for workers, step in getattr(one, key).items()}
            for key in ("after", "before")
        }
        work = {"base": one.measured.base, "chunks": len(one.measured.chunks), "seconds": sum(one.measured.chunks)}
        work |= {"theta": one.measured.theta, "largest_chunk": max(one.measured.chunks)}
        real = {str(workers): seconds for workers, seconds in one.real.items()}
        cases.append({"case": one.case, "about": one.about, "work": work, **steps, "real": real})
        cases[-1]["saturates_at"] = one.saturates_at
    return {"costs": vars(costs), "cases": cases}


def show(costs: Costs, found: Sequence[Scaling]) -> None:
    """The case that was measured last."""
    console = Console(width=120)
    console.print(
        f"client {costs.client_task * 1e3:.2f} ms a task; scheduler {costs.coordinator_task * 1e3:.2f} ms a task and "
        f"{costs.coordinator_worker * 1e3:.2f} ms a worker; {costs.step * 1e3:.1f} ms a step; round trip "
        f"{costs.round_trip * 1e3:.1f} ms; {costs.bandwidth / 1e9:.2f} GB/s"
    )
    for one in found[-1:]:
        work = one.measured
        table = Table(
            title=f"{one.about}: {sum(work.chunks):.3g} s in {len(work.chunks)} chunks, the longest "
            f"{max(work.chunks):.2g} s; base pass {work.base:.2g} s; θ {work.theta / 1e6:.2g} MB; twice as many "
            f"workers are less than a tenth faster from {one.saturates_at} on",
            title_justify="left",
        )
        for column in ("workers", "before, s", "now, s", "speed-up", "scheduler busy", "workers busy", "measured, s"):
            table.add_column(column, justify="right")
        alone = one.after[1].seconds
        for workers, step in one.after.items():
            real = f"{one.real[workers]:.3g}" if workers in one.real else ""
            table.add_row(
                str(workers), f"{one.before[workers].seconds:.3g}", f"{step.seconds:.3g}",
                f"{alone / step.seconds:.1f}", f"{step.coordinator:.0%}", f"{step.workers:.0%}", real,
            )  # fmt: skip
        console.print(table)
