"""Stages: train a corrector in the loop by one of the methods, and what some of them need beforehand."""

import time
from collections.abc import Callable
from typing import Any

import torch
from prefect.states import State
from torch import nn

from configs.solver_loop import LoopMethod, SolverLoop
from deepzero_core.errors import WorkError
from deepzero_core.perturb.black_box import BlackBox
from deepzero_core.sparsity import zo_grasp_scores
from deepzero_core.training import GradientSource, Schedule, StepRecord, Trainer, TrainingSettings
from deepzero_core.training.sources import step_generator
from simulators import methods
from simulators.methods.batches import Curriculum, Pairs, Shuffled, training_windows
from simulators.protocol import Simulator, Statistics
from tasks.history import read
from tasks.loop import Loop
from tasks.loop_problem import Setting, lowest_reynolds
from tasks.loop_validation import validating
from tasks.records import PRETRAINED, Cases, Corrected, Shares
from tasks.shares import shares_of
from tasks.solver import open_solver
from tasks.stage import Stage, Tracking, perform, save_tensors, stage_task
from tasks.train import digest

_SCORES = 4
_COUNTED = ("solver_steps", "diverged", "crashed", "restarts")


def _common(loop: SolverLoop, cases: Cases, seed: int) -> dict[str, Any]:
    """What every training depends on."""
    return {
        "cases": cases.digest,
        "corrector": loop.corrector,
        "reynolds": lowest_reynolds(loop) if loop.simulator.kind == "wake" else None,
        "validation": loop.training.validations if loop.cases.validation else None,
        "threads": loop.training.threads,
        "seed": seed,
    }


@stage_task("pretrain")
def pretrain_corrector(tracking: Tracking, loop: SolverLoop, cases: Cases, seed: int) -> State[Corrected] | Corrected:
    """The corrector that all methods begin with: after some steps of `non`."""
    inputs = _common(loop, cases, seed) | {"pretraining": loop.pretraining}
    given = loop.pretraining

    def work(stage: Stage) -> Corrected:
        return _train(
            stage, loop, cases, PRETRAINED, seed, None, None, steps=given.steps, lr=given.lr, pairs=given.batch_size
        )

    return perform(tracking, "pretrain", Corrected, inputs, work, label=f"corrector, seed {seed}")


@stage_task("share out")
def share_out_corrector(
    tracking: Tracking, loop: SolverLoop, cases: Cases, seed: int, before: Corrected | None
) -> State[Shares] | Shares:
    """Layer-wise ratios of the corrector that make a step of sparse estimation cost its queries exactly."""
    inputs = _common(loop, cases, seed) | {
        "before": before and before.weights_digest,
        "pruning": loop.pruning.model_dump(exclude={"redraw_steps"}),
        "queries": loop.training.queries,
        "unroll": loop.longest,
        "penalty": loop.training.penalty,
    }
    return perform(
        tracking,
        "share-out",
        Shares,
        inputs,
        lambda stage: _share_out(stage, loop, cases, seed, before),
        label=f"seed {seed}",
    )


def _share_out(stage: Stage, loop: SolverLoop, cases: Cases, seed: int, before: Corrected | None) -> Shares:
    torch.set_num_threads(loop.training.threads)
    started, pruning = time.perf_counter(), loop.pruning
    with open_solver(loop) as simulator:
        setting = Setting(loop, cases, simulator)
        corrector = corrector_after(setting, seed, before)
        scores, queries = {}, 0
        everything = sum(p.numel() for p in corrector.parameters() if p.requires_grad)
        # A budget that pays for every weight needs no sharing out.
        if pruning.method == "zo-grasp" and loop.training.queries <= everything:
            windows = training_windows(setting.unrolled, loop.stages, setting.train)
            count = min(pruning.examples, len(windows))
            inputs, targets = windows.batch([position * len(windows) // count for position in range(count)])
            module = setting.unrolled.unrolled(corrector, BlackBox(setting.unrolled.packed.of_arrays))
            found = zo_grasp_scores(
                module,
                inputs,
                targets,
                setting.unrolled.loss,
                queries=pruning.queries,
                mu=pruning.mu,
                generator=step_generator(seed, _SCORES),
            )
            scores = {name.removeprefix("corrector."): value for name, value in found.items()}
            queries = 2 * (1 + pruning.queries)
    budget = loop.training.queries
    return shares_of(stage, scores, corrector, budget, seed=seed, queries=queries, started=started)


@stage_task("couple")
def couple(
    tracking: Tracking,
    loop: SolverLoop,
    cases: Cases,
    method: LoopMethod,
    seed: int,
    *,
    before: Corrected | None = None,
    shares: Shares | None = None,
) -> State[Corrected] | Corrected:
    """Train the corrector by `method`, any but "src", from where `before` has left it."""
    training = loop.training
    inputs = _common(loop, cases, seed) | {
        "before": before and before.weights_digest,
        "shares": shares and shares.ratios,
        "redraw_steps": loop.pruning.redraw_steps if shares else None,
        "training": training.model_dump(exclude={"method", "checkpoint_every", "validations", "lr", "mu"}),
        "lr": _peak(loop, method),
        "mu": training.mu.get(method),
        "method": method,
    }

    def work(stage: Stage) -> Corrected:
        return _train(
            stage, loop, cases, method, seed, before, shares,
            steps=training.steps, lr=_peak(loop, method), pairs=training.batch_size,
        )  # fmt: skip

    return perform(tracking, "couple", Corrected, inputs, work, label=f"{method}, seed {seed}")


def uncorrected(seed: int) -> Corrected:
    """The method "src": nothing is trained, and the solver stays as it is."""
    return Corrected(
        method="src",
        seed=seed,
        folder=".",
        history=None,
        weights=None,
        weights_digest="",
        parameters=0,
        steps=0,
        kept_step=0,
        validation_mae=None,
        queries=0,
        solver_steps=0,
        diverged=0,
        crashed=0,
        restarts=0,
        seconds=0.0,
    )


def corrector_after(setting: Setting, seed: int, trained: Corrected | None) -> nn.Module:
    """The corrector as a training has left it; None: as it is in the beginning."""
    module = setting.corrector(seed)
    if trained is not None and trained.weights is not None:
        module.load_state_dict(torch.load(trained.weights, weights_only=True))
    return module


def _train(
    stage: Stage,
    loop: SolverLoop,
    cases: Cases,
    method: str,
    seed: int,
    before: Corrected | None,
    shares: Shares | None,
    *,
    steps: int,
    lr: float,
    pairs: int,
) -> Corrected:
    torch.set_num_threads(loop.training.threads)
    training = loop.training
    with open_solver(loop, method) as simulator:
        setting = Setting(loop, cases, simulator)
        module = corrector_after(setting, seed, before)
        batches: Shuffled
        source: GradientSource
        if method in ("non", PRETRAINED):
            inputs, targets = methods.Windows(setting.unrolled, setting.train).pairs()
            batches = Shuffled(Pairs(inputs, targets), min(pairs, len(inputs)), seed)
            source = methods.NonInteractive(setting.unrolled)
        else:
            source = Curriculum(setting.unrolled, loop.stages, gradient_source(loop, method, seed))
            windows = training_windows(setting.unrolled, loop.stages, setting.train)
            batches = Shuffled(windows, training.batch_size, seed, loop.pruning.redraw_steps, source.shorten)
        plan = TrainingSettings(
            steps=steps,
            schedule=Schedule(lr, steps, 0, training.schedule.name),
            seed=seed,
            optimizer=training.optimizer.name,
            optimizer_arguments=training.optimizer.arguments,
            ratios=None if shares is None else shares.ratios,
        )
        trainer = Trainer(module, batches, source, plan)
        with validating(loop, setting, module, stage.folder, steps=steps) as validation:
            trying: dict[str, Any] = {} if validation is None else {"evaluation": validation}
            work = Loop(stage, trainer, training.checkpoint_every, line=_counting(simulator), **trying)
            work.run()
            kept, error = (trainer.step, None) if validation is None else validation.keep_best(trainer.step)
        last_error = simulator.statistics.last_error
    weights = stage.folder / "weights.pt"
    save_tensors(weights, module.state_dict())
    stage.run.artifact(weights, "model")
    counts = dict.fromkeys(_COUNTED, 0)
    for line in (line for line in read(stage.folder / "history.jsonl") if line["kind"] == "step"):
        counts = {name: total + line[name] for name, total in counts.items()}
    if last_error:
        stage.run.tags({"deepzero.last_simulator_error": last_error})
    stage.summarise(
        **{f"cost/{name}": value for name, value in (("steps", trainer.step), ("queries", trainer.queries))},
        **{f"cost/{name}": value for name, value in counts.items()},
        **{"cost/seconds": work.clock.seconds},
    )
    return Corrected(
        method=method,
        seed=seed,
        folder=stage.folder,
        history=stage.folder / "history.jsonl",
        weights=weights,
        weights_digest=digest(module),
        parameters=sum(p.numel() for p in module.parameters()),
        steps=trainer.step,
        kept_step=kept,
        validation_mae=error,
        queries=trainer.queries,
        seconds=work.clock.seconds,
        **counts,
    )


def _counting(simulator: Simulator) -> Callable[[StepRecord, float], dict[str, Any]]:
    """What a step's line says of the solver: of this step alone, so that a run that was killed counts nothing twice."""
    seen = simulator.statistics

    def line(record: StepRecord, seconds: float) -> dict[str, Any]:
        nonlocal seen
        now, before = simulator.statistics, seen
        seen = now
        return {
            "solver_steps": now.steps - before.steps,
            "solver_steps_per_second": _rate(now, before),
            "diverged": now.diverged - before.diverged,
            "crashed": now.crashed - before.crashed,
            "restarts": now.restarts - before.restarts,
        }

    return line


def _rate(now: Statistics, before: Statistics) -> float | None:
    """Simulation-steps per second of the solver's own time."""
    seconds = now.seconds - before.seconds
    return (now.steps - before.steps) / seconds if seconds > 0 else None


def _peak(loop: SolverLoop, method: LoopMethod) -> float:
    return dict(loop.training.lr).get(method, loop.training.optimizer.lr)


def gradient_source(loop: SolverLoop, method: Any, seed: int) -> Callable[[methods.Loop], GradientSource]:
    """Where the method's gradients come from, for a loop of any length."""
    training = loop.training
    given = dict(training.mu).get(method)
    mu: dict[str, Any] = {} if given is None else {"mu": given}
    if method == "sol-fo":
        return methods.FirstOrderLoop
    if method == "sol-zo":
        return lambda each: methods.ZerothOrderLoop(each, **mu)
    if method == "sol-zo-split":
        return lambda each: methods.SplitLoop(each, training.queries, seed, **mu)
    raise WorkError(f"there is no training by {method!r}")
