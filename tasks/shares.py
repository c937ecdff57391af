"""The end of every stage that shares the queries of a step out over a network's layers."""

import time
from collections.abc import Mapping

from torch import Tensor, nn

from deepzero_core.sparsity import budget_ratios, draw_masks
from deepzero_core.training.sources import step_generator
from tasks.records import Shares
from tasks.stage import Stage


def shares_of(
    stage: Stage,
    scores: Mapping[str, Tensor],
    module: nn.Module,
    budget: int,
    *,
    seed: int,
    queries: int,
    started: float,
) -> Shares:
    """Ratios that make a step of sparse estimation cost `budget` queries exactly, logged.

    scores: of the layers; none: by size. queries: what the scores cost. started: of the stage, by `time.perf_counter`.
    """
    ratios = budget_ratios(scores, module, budget)
    coordinates = sum(int(mask.sum()) for mask in draw_masks(ratios, module, step_generator(seed)).values())
    seconds = time.perf_counter() - started
    stage.summarise(
        **{f"ratio/{name}": ratio for name, ratio in ratios.items()},
        coordinates=coordinates,
        queries=queries,
        seconds=seconds,
    )
    return Shares(ratios=ratios, coordinates=coordinates, queries=queries, seconds=seconds)
