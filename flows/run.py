"""What `deepzero run` does: look before it leaps, run the flow, show the result."""

import logging
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.defence import Defence
from configs.schema import DataConfig, Experiment, Section
from configs.solver_loop import SolverLoop
from configs.study import Study
from deepzero_core.errors import DeepZeroError, RequestError
from flows.catalogue import PACKAGES, flow_called
from flows.defence_plan import defence_plan
from flows.results import conclude
from flows.solver_loop_plan import solver_loop_plan
from infra import orchestration
from infra.home import home
from infra.specs import described

if TYPE_CHECKING:
    from torch import nn

    from deepzero_core.data import BatchSource


def execute(
    flow_name: str, experiment: Experiment | Defence | SolverLoop | Study, *, json_file: Path | None, dry_run: bool
) -> int:
    """Run a flow in this process and print its closing table; the exit status.

    Raises:
        RequestError: the data or the network of the experiment is not what it says; nothing has been created.
        WorkError: the work failed.
    """
    console = Console()
    plan = PLANS[type(experiment)]
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="deepzero-dry-run-") as folder:
            base = home() if _is_prepared(experiment) else Path(folder)
            # The time of somebody's classifier nobody can predict.
            options = {} if isinstance(experiment, Defence) else {"predict": True}
            console.print(plan(flow_name, experiment, base, **options))
        return 0
    plan(flow_name, experiment, home())
    orchestration.configure()
    _show_warnings()
    signal.signal(signal.SIGTERM, _stopped)
    from infra.temporary_server import ensure_server
    from tasks.stage import write_atomically

    ensure_server()
    reported = flow_called(flow_name)(experiment)
    if json_file is not None:
        write_atomically(json_file, reported.result.read_text(encoding="utf-8"))
    return conclude(console, reported.result)


def _is_prepared(experiment: Section) -> bool:
    """Whether nothing would be written to look at the data."""
    from deepzero_core.data import prepared_stores

    if isinstance(experiment, Study):
        experiment = next(experiment.points()).experiment
    data: DataConfig | None = getattr(experiment, "data", None)
    if data is None:
        return True
    try:
        return data.source is None and bool(prepared_stores(data.name, home=home()))
    except RequestError:
        return False


def _plan(flow_name: str, experiment: Experiment, base: Path, *, predict: bool = False) -> Table:
    """What will be done, from the real data and the real network: what cannot be built is refused here.

    `predict`: trace the network and say how long it will take, too.
    """
    from deepzero_core.data import prepare
    from deepzero_core.estimators.cge import queries
    from deepzero_core.sparsity import maskable_parameters
    from tasks.problem import problem_of, training_steps
    from tasks.records import Prepared

    data = experiment.data
    path = prepare(data.name, home=base, source=data.source, image_size=data.image_size).path
    prepared = Prepared.of_store(path)
    problem = problem_of(experiment, prepared)
    module, batches = problem.build_module(), problem.build_batches()
    if experiment.pruning.method in ("grasp", "zo-grasp"):
        batches.per_class(experiment.pruning.samples_per_class)
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    maskable = sum(sizes[name] for name in maskable_parameters(module))
    training = experiment.training
    steps = training_steps(experiment, batches)
    sparsity = experiment.pruning.sparsity if experiment.pruning.method != "none" else 0.0
    coordinates = sum(sizes.values()) - round(sparsity * maskable)
    estimator = experiment.estimator
    per_step = {
        "cge": queries(coordinates, estimator.difference),
        "rge": queries(estimator.queries, estimator.difference),
        "forward-gradient": 1 + estimator.queries,
    }.get(training.method, 1)
    budget = training.query_budget
    if budget is not None and budget < per_step and per_step > 1:
        raise RequestError(
            f"training.query_budget={budget} does not pay for one step, which spends {per_step:,} queries"
        )
    rows = {
        "flow": flow_name,
        "data": f"{data.name}: " + ", ".join(f"{count:,} {split}" for split, count in prepared.counts.items()),
        "network": f"{experiment.model.name}: {sum(sizes.values()):,} parameters, {maskable:,} of them maskable",
        "training": f"{training.method}, {steps:,} steps of {data.batch_size} examples",
        "queries": f"{per_step:,} per step, {per_step * steps:,} in all",
        "baselines": ", ".join(experiment.baselines) or "none",
        "workers": described(experiment.cluster),
    }
    if predict and training.method == "cge":
        rows |= _prediction(experiment, module, batches, steps)
    table = Table(show_header=False, box=None, title=f"{experiment.name}: what would be done", title_justify="left")
    for label, text in rows.items():
        table.add_row(f"[bold]{label}", text)
    return table


def study_plan(flow_name: str, study: Study, base: Path, *, predict: bool = False) -> Table:
    """The points of a study, each of which has to be possible; below, the plan of the first. `predict`: of that."""
    points = list(study.points(study.seeds[:1]))
    plans = [PLANS[type(point.experiment)](study.flow, point.experiment, base) for point in points]
    count = len(points) * len(study.seeds)
    seeds = ", ".join(map(str, study.seeds))
    table = Table(show_header=False, box=None, title=f"{study.name}: what would be done", title_justify="left")
    table.add_row("[bold]flow", flow_name)
    table.add_row("[bold]runs", f"{count:,} of {study.flow}: {len(points):,} points, seeds {seeds}")
    for point in points:
        table.add_row("[bold]point", escape(point.label))
    table.add_row("[bold]the first", plans[0])
    return table


PLANS: dict[type[Section], Callable[..., Table]] = {
    Experiment: _plan,
    Defence: defence_plan,
    SolverLoop: solver_loop_plan,
    Study: study_plan,
}


def _prediction(experiment: Experiment, module: "nn.Module", batches: "BatchSource", steps: int) -> dict[str, str]:
    """Time and operations of coordinate-wise estimation by the cost model, the masks spread evenly over the layers."""
    import torch

    from deepzero_core.sparsity import draw_masks, maskable_parameters
    from tasks.prediction import Yardstick, work_of_a_step
    from tasks.report import duration

    masks = None
    if experiment.pruning.method != "none":
        ratios = dict.fromkeys(maskable_parameters(module), experiment.pruning.sparsity)
        masks = draw_masks(ratios, module, torch.Generator().manual_seed(experiment.seed))
    cost = work_of_a_step(experiment, module, batches, masks)
    if not cost.flops:
        return {}
    seconds = Yardstick.of(experiment).seconds(cost)
    return {
        "operations": f"{cost.flops / 1e9:,.3g} GFLOP per step, {cost.flops * steps / 1e12:,.3g} TFLOP in all",
        "time": f"about {duration(seconds)} per step, {duration(seconds * steps)} in all, on this machine",
    }


def _stopped(*_: object) -> None:
    """An orderly end for SIGTERM: Prefect marks the run and sends the signal again; its server has to end, too."""
    print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
    raise SystemExit(128 + signal.SIGTERM)


def _show_warnings() -> None:
    """Warnings of our own packages, one line each, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.setLevel(logging.WARNING)
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    for runs in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(runs).addFilter(_sentence)


def _sentence(record: logging.LogRecord) -> bool:
    """Prefect logs what ends a run with its traceback; of our own errors the sentence says all."""
    if record.exc_info and isinstance(record.exc_info[1], DeepZeroError):
        record.exc_info = None
    return True
