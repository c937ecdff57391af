"""Which weights are worth a query: scores, layer-wise pruning ratios and masks."""

from deepzero_core.sparsity.budget import budget_ratios
from deepzero_core.sparsity.masks import draw_masks, layer_ratios, top_masks
from deepzero_core.sparsity.scores import (
    grasp_scores,
    magnitude_scores,
    maskable_parameters,
    random_scores,
    zo_grasp_scores,
)

__all__ = [
    "budget_ratios",
    "draw_masks",
    "grasp_scores",
    "layer_ratios",
    "magnitude_scores",
    "maskable_parameters",
    "random_scores",
    "top_masks",
    "zo_grasp_scores",
]
