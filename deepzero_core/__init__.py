"""The mathematics of deepzero: estimators, sparsity, smoothing, training. Pure: no orchestration, no tracking."""

from deepzero_core.estimators import GradientEstimate, cge, first_order, forward_gradient, rge
from deepzero_core.perturb import reference

__all__ = ["GradientEstimate", "cge", "first_order", "forward_gradient", "reference", "rge"]
