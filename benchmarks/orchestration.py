"""What Prefect, MLflow and Dask cost: the training stage of a flow against the bare loop, step by step in turns.

Two trainings of the same experiment on the same batches with the same masks: one inside a Prefect flow, recorded in
MLflow, its coordinates evaluated by one Dask worker, with history, checkpoints and progress as in every run; the other
a plain `for record in trainer.run()` in this process. They take turns, one step each, so that whatever disturbs the
machine disturbs both, and what comes out has to be the same bits.

turn       wall seconds from the moment a step may begin to the moment the next one could: all that is done between
           steps belongs to the step before
processor  seconds of all processes of this benchmark (workers and Prefect's server included) during the turns
"""

import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

import configs
from configs.schema import Experiment
from deepzero_core.errors import WorkError

BAR = 0.03
"""What orchestration may cost, as a share of the bare loop."""
PRESET = "cifar10-cnn"
_TICK_S = 0.01


@dataclass
class Turns:
    """Two threads, one of which works at a time. Seconds of each turn, by side."""

    wall: dict[str, list[float]] = field(default_factory=lambda: {"bare": [], "orchestrated": []})
    processor: dict[str, list[float]] = field(default_factory=lambda: {"bare": [], "orchestrated": []})
    _whose: str = "bare"
    _both: set[str] = field(default_factory=set)
    _change: threading.Condition = field(default_factory=threading.Condition)

    def taken(self, side: str, records: Iterator[Any]) -> Iterator[Any]:
        """The records of a trainer, each made when it is this side's turn."""
        self._arrive(side)
        while True:
            started = self._begin(side)
            record = next(records, None)
            if record is None:
                self._leave(side)
                return
            # What the caller does with the record belongs to the turn.
            yield record
            self._end(side, started)

    def _arrive(self, side: str) -> None:
        """Wait for the other side: preparations are nobody's turn."""
        with self._change:
            self._both.add(side)
            self._change.notify_all()
            self._change.wait_for(lambda: len(self._both) == 2)

    def _begin(self, side: str) -> tuple[float, float]:
        with self._change:
            self._change.wait_for(lambda: self._whose == side)
        return processor_s(), time.perf_counter()

    def _end(self, side: str, started: tuple[float, float]) -> None:
        self.wall[side].append(time.perf_counter() - started[1])
        self.processor[side].append(processor_s() - started[0])
        self._leave(side)

    def _leave(self, side: str) -> None:
        with self._change:
            self._whose = "bare" if side == "orchestrated" else "orchestrated"
            self._change.notify_all()


@dataclass(frozen=True)
class Cost:
    """What was measured. Shares are of the bare loop's."""

    steps: int
    data: str
    start_up_s: float
    """From the call of the flow to the first step: server, store, cluster, data, pruning."""
    bare_s: float
    orchestrated_s: float
    """Median seconds of a turn."""
    median_share: float
    """Median over the steps of (orchestrated − bare)/bare, turn by turn."""
    processor_share: float
    """(orchestrated − bare)/bare of the processor seconds of all steps together."""
    total_share: float
    """The same of the wall seconds."""
    same_bits: bool
    wall: dict[str, list[float]]
    processor: dict[str, list[float]]

    @property
    def holds(self) -> bool:
        """By the processor's time, which other programs on the machine do not lengthen much."""
        return self.processor_share <= BAR


def processor_s() -> float:
    """Processor seconds of this process and all that it has started."""
    total = time.process_time()
    for child in _children():
        with suppress(psutil.Error):
            spent = child.cpu_times()
            total += spent.user + spent.system
    return total


_known: list[psutil.Process] = []


def _children() -> list[psutil.Process]:
    # Looking for them costs more than a step may: they are looked for once, when both sides are ready.
    return _known


def measure(steps: int, report: Callable[[str], None]) -> Cost:
    """Train both ways, in turns; below a home and a Prefect folder that the caller has set up."""
    import tasks.train  # noqa: F401

    experiment, data = _experiment(steps)
    turns, inputs, digests = Turns(), queue.Queue[Any](), {}
    bare = threading.Thread(target=lambda: digests.update(bare=_bare(experiment, inputs, turns)), daemon=True)
    bare.start()
    started = time.perf_counter()
    report(f"{steps} steps of {PRESET} on {data}, both ways in turns")
    digests["orchestrated"], ready = _orchestrated(experiment, inputs, turns, report)
    bare.join(600)
    if bare.is_alive() or "bare" not in digests:
        raise WorkError("the bare loop did not end")
    # A worker's first step builds what later ones find; the last evaluates the network, the bare loop's does not.
    pairs = list(zip(turns.wall["bare"], turns.wall["orchestrated"], strict=True))[1:-1]
    sums = {side: sum(values[1 : len(pairs) + 1]) for side, values in turns.processor.items()}
    totals = [sum(side) for side in zip(*pairs, strict=True)]
    return Cost(
        steps=len(pairs),
        data=data,
        start_up_s=ready - started,
        bare_s=statistics.median(one for one, _ in pairs),
        orchestrated_s=statistics.median(other for _, other in pairs),
        median_share=statistics.median(other / one - 1 for one, other in pairs),
        processor_share=sums["orchestrated"] / sums["bare"] - 1,
        total_share=totals[1] / totals[0] - 1,
        same_bits=digests["bare"] == digests["orchestrated"],
        wall=turns.wall,
        processor=turns.processor,
    )


def _experiment(steps: int) -> tuple[Experiment, str]:
    """The preset on real CIFAR-10 where it is there, else on synthetic images of its shape."""
    from deepzero_core.data import prepare
    from deepzero_core.errors import RequestError
    from infra.home import home

    settings = [f"training.steps={steps}", "training.epochs=1000", "baselines=[]", "cluster.workers=1"]
    settings += ["training.evaluate_every=1000", "training.schedule.name=constant"]
    try:
        prepare("cifar10", home=home())
        data = "CIFAR-10"
    except RequestError:
        file = _synthetic(home() / "synthetic.npz")
        settings += ["data.name=npz", f"data.source={file}"]
        data = "synthetic images of CIFAR-10's shape"
    return configs.load(PRESET, settings), data


def _synthetic(path: Path) -> Path:
    import numpy as np

    draw = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    splits = {"images": 50_000, "test_images": 2_000}
    images = {name: draw.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8) for name, count in splits.items()}
    labels = {name.replace("images", "labels"): np.arange(count) % 10 for name, count in splits.items()}
    np.savez(path, **images, **labels)  # type: ignore[arg-type]
    return path


def _bare(experiment: Experiment, inputs: "queue.Queue[Any]", turns: Turns) -> str:
    """The plain loop, in this process."""
    import torch
    from torch.nn import functional as F

    from deepzero_core.training import CGESource, Trainer
    from tasks.problem import problem_of
    from tasks.train import digest, settings_of

    prepared, pruned = inputs.get()
    problem = problem_of(experiment, prepared)
    module, batches = problem.build_module(), problem.build_batches()
    source = CGESource(F.cross_entropy, problem.mu, problem.difference, problem.memory, problem.precision)
    trainer = Trainer(module, batches, source, settings_of(experiment, batches, pruned, "cge"))
    torch.set_num_threads(experiment.training.threads)
    for _ in turns.taken("bare", trainer.run()):
        pass
    return digest(module)


def _orchestrated(
    experiment: Experiment, inputs: "queue.Queue[Any]", turns: Turns, report: Callable[[str], None]
) -> tuple[str, float]:
    """The flow's own stages; only the trainer waits for its turn. The weights, and when the first step could begin."""
    ready = 0.0

    def waiting(records: Iterator[Any]) -> Iterator[Any]:
        nonlocal ready
        ready = time.perf_counter()
        _known[:] = psutil.Process().children(recursive=True)
        report(f"both are ready; processes beside this one: {len(_known)}")
        return turns.taken("orchestrated", records)

    return in_flow(experiment, waiting, lambda *made: inputs.put(made)), ready


def in_flow(
    experiment: Experiment,
    watched: Callable[[Iterator[Any]], Iterator[Any]],
    handed: Callable[..., None] = lambda *made: None,
) -> str:
    """Prepare, prune and train in a Prefect flow, by the stages of `classify`; the digest of the weights.

    watched: what becomes of the trainer's records on their way to the stage. handed: is given the records of the first
    two stages.
    """
    from prefect import flow

    from deepzero_core.training import Trainer
    from flows.experiment import recorded
    from tasks import train as stage
    from tasks.prepare import prepare
    from tasks.prune import prune

    class Watched(Trainer):
        def run(self) -> Iterator[Any]:
            return watched(super().run())

    @flow(name="benchmark", flow_run_name="benchmark")
    def benchmark() -> str:
        with recorded("benchmark", experiment) as tracking:
            prepared = prepare(tracking, experiment.data)
            pruned = prune(tracking, experiment, prepared)
            handed(prepared, pruned)
            return stage.train(tracking, experiment, prepared, pruned, "cge").weights_digest

    plain = stage.Trainer
    stage.Trainer = Watched  # type: ignore[misc]
    try:
        return benchmark()
    finally:
        stage.Trainer = plain  # type: ignore[misc]


def show(cost: Cost) -> None:
    """The table, in the terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "bare loop", "Prefect + MLflow + Dask", "difference"):
        table.add_column(column, justify="right" if column else "left")
    ms = [f"{seconds * 1e3:.1f} ms" for seconds in (cost.bare_s, cost.orchestrated_s)]
    spent = {side: sum(values[1 : cost.steps + 1]) for side, values in cost.processor.items()}
    table.add_row("a step, median", *ms, f"{cost.median_share:+.1%}")
    table.add_row(
        "processor seconds of all steps",
        f"{spent['bare']:.1f}",
        f"{spent['orchestrated']:.1f}",
        f"{cost.processor_share:+.1%}",
    )
    totals = [sum(cost.wall[side][1 : cost.steps + 1]) for side in ("bare", "orchestrated")]
    table.add_row("wall seconds of all steps", *(f"{total:.1f}" for total in totals), f"{cost.total_share:+.1%}")
    Console(width=120).print(table)
    print(f"{cost.steps} steps on {cost.data}; start-up once, {cost.start_up_s:.1f} s; bar {BAR:.0%}", end="; ")
    print("the same bits" if cost.same_bits else "NOT the same bits")
    each = cost.orchestrated_s - cost.bare_s
    if each > 0:
        print(f"{each * 1e3:.1f} ms a step, however long it is: {BAR:.0%} of a step of {each / BAR:.2f} s")


def document(cost: Cost) -> dict[str, Any]:
    return asdict(cost) | {"bar": BAR, "holds": cost.holds}
