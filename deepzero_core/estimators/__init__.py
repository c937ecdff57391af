"""Gradient estimators on one interface: (module, batch, loss) → gradients and queries spent."""

from deepzero_core.estimators.cge import cge
from deepzero_core.estimators.first_order import first_order
from deepzero_core.estimators.forward_gradient import forward_gradient
from deepzero_core.estimators.rge import rge
from deepzero_core.perturb.estimate import GradientEstimate

__all__ = ["GradientEstimate", "cge", "first_order", "forward_gradient", "rge"]
