"""The mathematics of deepzero: estimators, sparsity, smoothing, training. Pure: no orchestration, no tracking.

from deepzero_core import cge, rge, forward_gradient, first_order, reference, GradientEstimate
from deepzero_core import BlackBox, behind, open_oracle, as_layer
from deepzero_core import grasp_scores, zo_grasp_scores, layer_ratios, draw_masks
from deepzero_core import certify, predict
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepzero_core.estimators import GradientEstimate, cge, first_order, forward_gradient, rge
    from deepzero_core.oracle import as_layer, open_oracle
    from deepzero_core.perturb import reference
    from deepzero_core.perturb.black_box import BlackBox, behind
    from deepzero_core.smoothing import Certificate, certify, predict
    from deepzero_core.sparsity import (
        draw_masks,
        grasp_scores,
        layer_ratios,
        magnitude_scores,
        random_scores,
        zo_grasp_scores,
    )

__all__ = [
    "BlackBox",
    "Certificate",
    "GradientEstimate",
    "as_layer",
    "behind",
    "certify",
    "cge",
    "draw_masks",
    "first_order",
    "forward_gradient",
    "grasp_scores",
    "layer_ratios",
    "magnitude_scores",
    "open_oracle",
    "predict",
    "random_scores",
    "reference",
    "rge",
    "zo_grasp_scores",
]

_HOMES = {
    "estimators": ("GradientEstimate", "cge", "first_order", "forward_gradient", "rge"),
    "oracle": ("as_layer", "open_oracle"),
    "perturb": ("reference",),
    "perturb.black_box": ("BlackBox", "behind"),
    "smoothing": ("Certificate", "certify", "predict"),
    "sparsity": (
        "draw_masks",
        "grasp_scores",
        "layer_ratios",
        "magnitude_scores",
        "random_scores",
        "zo_grasp_scores",
    ),
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: torch takes seconds, and configuration and help do without it.
    for home, names in _HOMES.items():
        if name in names:
            package = importlib.import_module(f"{__name__}.{home}")
            return (
                importlib.import_module(f"{__name__}.{home}.{name}") if name == "reference" else getattr(package, name)
            )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
