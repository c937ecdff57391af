"""Stage: train the network with one method. Killed at any moment, it goes on from its last checkpoint, same bits."""

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from prefect.logging import get_run_logger
from prefect.states import State
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Experiment
from deepzero_core.data import BatchSource
from deepzero_core.sparsity import top_masks
from deepzero_core.training import (
    CGESource,
    FirstOrderSource,
    ForwardGradientSource,
    GradientSource,
    RGESource,
    Schedule,
    StepRecord,
    Trainer,
    TrainingSettings,
)
from infra.cluster import open_cluster
from infra.forward import DistributedCGE
from infra.problem import Problem
from tasks.evaluate import score
from tasks.loop import Loop
from tasks.prediction import Prepare, Yardstick, work_of_a_step
from tasks.problem import problem_of, test_batches, training_steps
from tasks.records import Prepared, Pruned, Trained
from tasks.stage import Stage, Tracking, perform, save_tensors, stage_task

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


def _train(stage: Stage, experiment: Experiment, prepared: Prepared, pruned: Pruned, method: str) -> Trained:
    torch.set_num_threads(experiment.training.threads)
    problem = problem_of(experiment, prepared)
    module, batches = problem.build_module(), problem.build_batches()
    with _source(experiment, problem, method) as source:
        trainer = Trainer(module, batches, source, settings_of(experiment, batches, pruned, method))
        loop = Loop(stage, trainer, experiment.training.checkpoint_every)
        _log_masks(stage, trainer)
        yardstick = Yardstick.of(experiment)
        if isinstance(source, CGESource | DistributedCGE):
            loop.expected = _predict(stage, experiment, trainer, yardstick, batches, source.prepared)
        loop.line = _line(trainer, yardstick, _forward_flops(module, batches))
        loop.evaluation = _evaluation(stage, experiment, trainer, test_batches(experiment, prepared))
        loop.run()
    weights = stage.folder / "weights.pt"
    save_tensors(weights, module.state_dict())
    stage.run.artifact(weights, "model")
    seconds = loop.clock.seconds
    stage.summarise(**{"cost/steps": trainer.step, "cost/queries": trainer.queries, "cost/seconds": seconds})
    return Trained(
        method=method,
        folder=stage.folder,
        history=stage.folder / "history.jsonl",
        weights=weights,
        weights_digest=digest(module),
        sparse=trainer.settings.ratios is not None or trainer.settings.weight_masks is not None,
        steps=trainer.step,
        queries=trainer.queries,
        seconds=seconds,
    )


def _predict(
    stage: Stage,
    experiment: Experiment,
    trainer: Trainer,
    yardstick: Yardstick,
    batches: BatchSource,
    prepared: Prepare,
) -> float | None:
    """Seconds of the next step by the cost model, logged with those of the whole run; None where it has no say."""
    if trainer.step == trainer.settings.steps:
        return None
    cost = work_of_a_step(experiment, trainer.module, batches, trainer.coordinates(), prepared)
    if not cost.flops:
        return None
    seconds, steps = yardstick.seconds(cost), trainer.settings.steps
    stage.run.metrics({"cost/predicted_run_seconds": seconds * steps}, step=trainer.step)
    get_run_logger().info("predicted: %.3g s per step, %.0f s for %d steps", seconds, seconds * steps, steps)
    return seconds


def _line(trainer: Trainer, yardstick: Yardstick, flops: int) -> Callable[[StepRecord, float], dict[str, Any]]:
    """What the history says of a step's cost; `flops`: of one forward pass."""
    first, started = trainer.queries, time.perf_counter()

    def line(record: StepRecord, seconds: float) -> dict[str, Any]:
        return {
            "queries_per_second": (record.queries - first) / (time.perf_counter() - started),
            "forward_flops": record.queries * flops,
            "peak_memory_bytes": _peak_memory(),
            **yardstick.fields(record.work, seconds),
        }

    return line


def _evaluation(
    stage: Stage, experiment: Experiment, trainer: Trainer, test: BatchSource
) -> Callable[[StepRecord, bool], dict[str, Any] | None]:
    """Accuracy on the test split every so many epochs; the masks of a new epoch are kept on the way."""

    def evaluation(record: StepRecord, last: bool) -> dict[str, Any] | None:
        if record.epoch_ends and not last and trainer.epoch % experiment.pruning.redraw_epochs == 0:
            _log_masks(stage, trainer)
        due = record.epoch_ends and (record.epoch + 1) % experiment.training.evaluate_every == 0
        if not last and not due:
            return None
        accuracy, loss, _, _ = score(trainer.module, test)
        return {"test_accuracy": accuracy, "test_loss": loss}

    return evaluation


def _log_masks(stage: Stage, trainer: Trainer) -> None:
    """The masks of the next step: a function of ratios, seed and epoch, kept to be looked at."""
    coordinates = trainer.coordinates()
    if coordinates is not None:
        path = stage.folder / f"masks-epoch-{trainer.epoch:04d}.pt"
        save_tensors(path, coordinates)
        stage.run.artifact(path, "masks")


def settings_of(experiment: Experiment, batches: BatchSource, pruned: Pruned, method: str) -> TrainingSettings:
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
    elif cluster.workers == 0:
        yield CGESource(loss, problem.mu, problem.difference, problem.memory, problem.precision)
    else:
        with (
            open_cluster(cluster, mentions=dict(problem.model)) as client,
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


def digest(module: nn.Module) -> str:
    """sha256 of a network's values."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
