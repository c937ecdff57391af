"""Stage: score every weight once, at initialisation, and turn the scores into layer-wise pruning ratios."""

import time

import torch
from prefect.states import State
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import Experiment
from deepzero_core.data import BatchSource
from deepzero_core.sparsity import (
    draw_masks,
    grasp_scores,
    layer_ratios,
    magnitude_scores,
    random_scores,
    zo_grasp_scores,
)
from deepzero_core.training.sources import step_generator
from tasks.problem import problem_of
from tasks.records import Prepared, Pruned
from tasks.stage import Stage, Tracking, perform, save_tensors, stage_task

_SCORES = 2


@stage_task("prune")
def prune(tracking: Tracking, experiment: Experiment, prepared: Prepared) -> State[Pruned] | Pruned:
    """Layer-wise pruning ratios of the experiment's network on the experiment's data."""
    inputs = {
        "data": prepared,
        "limits": experiment.data.train_limit,
        "model": experiment.model,
        "pruning": experiment.pruning.model_dump(exclude={"redraw_epochs"}),
        "seed": experiment.seed,
        "threads": experiment.training.threads,
    }
    return perform(tracking, "prune", Pruned, inputs, lambda stage: _prune(stage, experiment, prepared))


def _prune(stage: Stage, experiment: Experiment, prepared: Prepared) -> Pruned:
    torch.set_num_threads(experiment.training.threads)
    started = time.perf_counter()
    problem, pruning = problem_of(experiment, prepared), experiment.pruning
    module = problem.build_module().train()
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    ratios: dict[str, float] = {}
    queries = 0
    if pruning.method != "none":
        scores, queries = _scores(experiment, module, problem.build_batches())
        save_tensors(stage.folder / "scores.pt", scores)
        ratios = layer_ratios(scores, pruning.sparsity)
    masks = draw_masks(ratios, module, step_generator(experiment.seed))
    pruned = Pruned(
        folder=stage.folder,
        method=pruning.method,
        sparsity=pruning.sparsity if ratios else 0.0,
        ratios=ratios,
        sizes=sizes,
        coordinates=sum(int(mask.sum()) for mask in masks.values()),
        queries=queries,
        seconds=time.perf_counter() - started,
    )
    stage.run.text(pruned.model_dump_json(indent=2, exclude={"folder"}), "pruning/layer_ratios.json")
    if ratios:
        stage.run.artifact(stage.folder / "scores.pt", "pruning")
    stage.summarise(
        **{f"ratio/{name}": ratio for name, ratio in ratios.items()},
        coordinates=pruned.coordinates,
        queries=queries,
        seconds=pruned.seconds,
    )
    return pruned


def _scores(experiment: Experiment, module: nn.Module, batches: BatchSource) -> tuple[dict[str, Tensor], int]:
    """Scores by the configured criterion (higher = keep), and the loss evaluations they cost."""
    pruning = experiment.pruning
    generator = step_generator(experiment.seed, _SCORES)
    if pruning.method == "magnitude":
        return magnitude_scores(module), 0
    if pruning.method == "random":
        return random_scores(module, generator), 0
    inputs, targets = batches.per_class(pruning.samples_per_class)
    if pruning.method == "grasp":
        return grasp_scores(module, inputs, targets, F.cross_entropy), 1
    scores = zo_grasp_scores(
        module, inputs, targets, F.cross_entropy, queries=pruning.queries, mu=pruning.mu, generator=generator
    )
    return scores, 2 * (1 + pruning.queries)
