"""Stage: train the network with one method. Killed at any moment, it goes on from its last checkpoint, same bits."""

import hashlib
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefect.logging import get_run_logger
from prefect.states import State
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Experiment
from deepzero_core.data import BatchSource
from deepzero_core.errors import RequestError, WorkError
from deepzero_core.sparsity import top_masks
from deepzero_core.training import (
    CGESource,
    FirstOrderSource,
    ForwardGradientSource,
    GradientSource,
    NonFiniteError,
    RGESource,
    Schedule,
    StepRecord,
    Trainer,
    TrainingSettings,
)
from deepzero_core.training.checkpoint import load_newest, save_step
from infra.cluster import connect
from infra.forward import DistributedCGE, Problem
from tasks.evaluate import score
from tasks.history import History
from tasks.prediction import Yardstick, work_of_a_step
from tasks.problem import problem_of, test_batches, training_steps
from tasks.progress import Progress
from tasks.records import Prepared, Pruned, Trained
from tasks.stage import Stage, Tracking, perform, stage_task
from tasks.tracking import metrics_of

_CHECKPOINT_EVERY_S = 60.0
_SPARSE = ("cge", "first-order-sparse-gradients")


@stage_task("train")
def train(
    tracking: Tracking, experiment: Experiment, prepared: Prepared, pruned: Pruned, method: str
) -> State[Trained] | Trained:
    """Train the experiment's network with `method`, one of `configs.schema.METHODS`."""
    training = experiment.training
    inputs = {
        "data": prepared,
        "batches": experiment.data.model_dump(exclude={"source", "name"}),
        "model": experiment.model,
        "ratios": pruned.ratios,
        "redraw_epochs": experiment.pruning.redraw_epochs,
        "estimator": experiment.estimator,
        "training": training.model_dump(exclude={"method", "checkpoint_every"}),
        "method": method,
        "seed": experiment.seed,
    }
    return perform(
        tracking,
        "train",
        Trained,
        inputs,
        lambda stage: _train(stage, experiment, prepared, pruned, method),
        label=method,
    )


@dataclass
class _Clock:
    """Wall time of the run, the time before a kill included."""

    before: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._started


def _train(stage: Stage, experiment: Experiment, prepared: Prepared, pruned: Pruned, method: str) -> Trained:
    torch.set_num_threads(experiment.training.threads)
    problem = problem_of(experiment, prepared)
    module, batches = problem.build_module(), problem.build_batches()
    with _source(experiment, problem, method) as source:
        trainer = Trainer(module, batches, source, _settings(experiment, batches, pruned, method))
        before = _resume(stage, trainer)
        clock = _Clock(before)
        _log_masks(stage, trainer)
        yardstick = Yardstick.of(experiment)
        expected = _predict(stage, experiment, trainer, yardstick, batches) if method == "cge" else None
        flops, test = _forward_flops(module, batches), test_batches(experiment, prepared)
        _loop(stage, experiment, trainer, clock, flops, test, yardstick, expected)
    weights = stage.folder / "weights.pt"
    torch.save(module.state_dict(), weights)
    stage.run.artifact(weights, "model")
    newest = load_newest(stage.folder / "checkpoints").path
    if newest is not None:
        stage.run.artifact(newest, "checkpoints")
    stage.summarise(**{"cost/steps": trainer.step, "cost/queries": trainer.queries, "cost/seconds": clock.seconds})
    return Trained(
        method=method,
        folder=stage.folder,
        history=stage.folder / "history.jsonl",
        weights=weights,
        weights_digest=_digest(module),
        sparse=trainer.settings.ratios is not None or trainer.settings.weight_masks is not None,
        steps=trainer.step,
        queries=trainer.queries,
        seconds=clock.seconds,
    )


def _predict(
    stage: Stage, experiment: Experiment, trainer: Trainer, yardstick: Yardstick, batches: BatchSource
) -> float | None:
    """Seconds of the next step by the cost model, logged with those of the whole run; None where it has no say."""
    if trainer.step == trainer.settings.steps:
        return None
    cost = work_of_a_step(experiment, trainer.module, batches, trainer.coordinates())
    if not cost.flops:
        return None
    seconds, steps = yardstick.seconds(cost), trainer.settings.steps
    stage.run.metrics({"cost/predicted_run_seconds": seconds * steps}, step=trainer.step)
    get_run_logger().info("predicted: %.3g s per step, %.0f s for %d steps", seconds, seconds * steps, steps)
    return seconds


def _loop(
    stage: Stage,
    experiment: Experiment,
    trainer: Trainer,
    clock: _Clock,
    flops: int,
    test: BatchSource,
    yardstick: Yardstick,
    expected: float | None,
) -> None:
    """Drive the trainer: history, metrics, evaluations, checkpoints, progress. `expected`: seconds per step."""
    training, total = experiment.training, trainer.settings.steps
    history = History(stage.folder / "history.jsonl", last_step=trainer.step)
    for line in history.kept:
        stage.run.metrics(metrics_of(line), step=line["step"])
    saved_at = time.monotonic()
    first, started = trainer.queries, time.perf_counter()
    with history, Progress(stage.title, total, trainer.step, expected) as progress:
        accuracy = ""
        for record, seconds in _timed(_explained(trainer, stage.folder)):
            speed = (record.queries - first) / (time.perf_counter() - started)
            line = _step_line(record, speed, flops, clock.seconds) | yardstick.fields(record.work, seconds)
            history.append(line)
            stage.run.metrics(metrics_of(line), step=record.step)
            last = record.step == total or not trainer.budget_left
            if last or (record.epoch_ends and (record.epoch + 1) % training.evaluate_every == 0):
                line = _evaluation_line(trainer, record, clock.seconds, test)
                history.append(line)
                stage.run.metrics(metrics_of(line), step=record.step)
                accuracy = f", test accuracy {line['test_accuracy']:.1%}"
            if last or record.step % training.checkpoint_every == 0 or _overdue(saved_at):
                history.flush()
                save_step(stage.folder / "checkpoints", record.step, _checkpoint(stage, trainer, clock))
                stage.run.flush()
                saved_at = time.monotonic()
            if record.epoch_ends and not last and trainer.epoch % experiment.pruning.redraw_epochs == 0:
                _log_masks(stage, trainer)
            progress.advance(f"loss {record.loss:.3f}{accuracy}")
    stage.run.artifact(stage.folder / "history.jsonl", "history")


def _checkpoint(stage: Stage, trainer: Trainer, clock: _Clock) -> dict[str, Any]:
    """The stage's key is the digest of the configuration, the data and the code that the rest of the run needs."""
    return {"trainer": trainer.state(), "seconds": clock.seconds, "config_digest": stage.folder.name}


def _overdue(saved_at: float) -> bool:
    return time.monotonic() - saved_at > _CHECKPOINT_EVERY_S


def _timed(records: Iterator[StepRecord]) -> Iterator[tuple[StepRecord, float]]:
    """Each record with the seconds that its step took, without what is done between the steps."""
    while True:
        started = time.perf_counter()
        record = next(records, None)
        if record is None:
            return
        yield record, time.perf_counter() - started


def _explained(trainer: Trainer, folder: Path) -> Iterator[StepRecord]:
    """The trainer's records; a loss that is no longer finite is reported with the last good checkpoint."""
    try:
        yield from trainer.run()
    except NonFiniteError as error:
        good = load_newest(folder / "checkpoints").path
        where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise WorkError(f"{error}; {where}") from error


def _step_line(record: StepRecord, speed: float, flops: int, seconds: float) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": record.step,
        "epoch": record.epoch,
        "loss": record.loss,
        "accuracy": record.accuracy,
        "learning_rate": record.learning_rate,
        "queries": record.queries,
        "queries_per_second": speed,
        "forward_flops": record.queries * flops,
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(),
    }


def _evaluation_line(trainer: Trainer, record: StepRecord, seconds: float, test: BatchSource) -> dict[str, Any]:
    accuracy, loss, _, _ = score(trainer.module, test)
    return {
        "kind": "evaluation",
        "step": record.step,
        "epoch": record.epoch,
        "queries": record.queries,
        "seconds": seconds,
        "test_accuracy": accuracy,
        "test_loss": loss,
    }


def _resume(stage: Stage, trainer: Trainer) -> float:
    """Restore the newest good checkpoint, if there is one; the seconds already spent."""
    found = load_newest(stage.folder / "checkpoints")
    logger = get_run_logger()
    for damage in found.damaged:
        logger.warning("%s; using an older one", damage)
        print(f"warning: {damage}; using an older one", file=sys.stderr)
    if found.state is None:
        return 0.0
    if found.state["config_digest"] != stage.folder.name:
        raise RequestError(
            f"checkpoint {found.path} belongs to the configuration {found.state['config_digest']}, not to "
            f"{stage.folder.name}: move it away, and the training starts anew"
        )
    trainer.restore(found.state["trainer"])
    logger.info("resumed at step %d from %s", trainer.step, found.path)
    return float(found.state["seconds"])


def _log_masks(stage: Stage, trainer: Trainer) -> None:
    """The masks of the next step: a function of ratios, seed and epoch, kept to be looked at."""
    coordinates = trainer.coordinates()
    if coordinates is not None:
        path = stage.folder / f"masks-epoch-{trainer.epoch:04d}.pt"
        torch.save(dict(coordinates), path)
        stage.run.artifact(path, "masks")


def _settings(experiment: Experiment, batches: BatchSource, pruned: Pruned, method: str) -> TrainingSettings:
    training = experiment.training
    per_epoch = batches.steps_per_epoch
    steps = training_steps(experiment, batches)
    warmup = min(training.schedule.warmup_epochs * per_epoch, steps)
    weight_masks = None
    if method == "first-order-sparse-weights":
        scores = torch.load(pruned.folder / "scores.pt", weights_only=True)
        weight_masks = top_masks(scores, experiment.pruning.sparsity)
    return TrainingSettings(
        steps=steps,
        schedule=Schedule(training.optimizer.lr, steps, warmup, training.schedule.name),
        seed=experiment.seed,
        optimizer=training.optimizer.name,
        optimizer_arguments=training.optimizer.arguments,
        ratios=pruned.ratios if method in _SPARSE and pruned.ratios else None,
        redraw_epochs=experiment.pruning.redraw_epochs,
        weight_masks=weight_masks,
        query_budget=training.query_budget if method not in _FIRST_ORDER else None,
    )


_FIRST_ORDER = ("first-order", "first-order-sparse-weights", "first-order-sparse-gradients")


@contextmanager
def _source(experiment: Experiment, problem: Problem, method: str) -> Iterator[GradientSource]:
    """Where the method's gradients come from; with workers, coordinates go to Dask."""
    estimator, cluster, loss = experiment.estimator, experiment.cluster, F.cross_entropy
    if method == "rge":
        yield RGESource(loss, estimator.queries, experiment.seed, estimator.mu, estimator.difference)
    elif method == "forward-gradient":
        yield ForwardGradientSource(loss, estimator.queries, experiment.seed)
    elif method in _FIRST_ORDER:
        yield FirstOrderSource(loss)
    elif cluster.workers == 0 and cluster.address is None:
        yield CGESource(loss, problem.mu, problem.difference, problem.memory, problem.precision)
    else:
        with (
            connect(cluster.workers, cluster.address, cluster.timeout_s) as client,
            DistributedCGE(client, problem, cluster.timeout_s) as source,
        ):
            yield source


def _forward_flops(module: nn.Module, batches: BatchSource) -> int:
    """Floating-point operations of one forward pass over a training batch."""
    inputs, _ = batches.batch(0, 0)
    training = module.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(inputs)
    module.train(training)
    return int(counter.get_total_flops())


def _peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
