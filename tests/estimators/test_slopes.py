"""The order of accuracy: the slope of log error against log μ, in float64, on a smooth network."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, first_order, reference

SMOOTHING = [2e-2, 1e-2, 5e-3, 2.5e-3]


def smooth_network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(),
        nn.Linear(5, 3),
    )  # fmt: skip
    return module.double(), torch.randn(8, 2, 6, 6, dtype=torch.float64), torch.randint(3, (8,))


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    squared = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return float(np.sqrt(squared))


@pytest.mark.parametrize("estimator", [cge, reference.cge], ids=["engine", "reference"])
@pytest.mark.parametrize(("difference", "order"), [("forward", 1), ("central", 2)])
def test_error_falls_with_the_order_of_the_difference(estimator, difference: str, order: int) -> None:
    module, inputs, targets = smooth_network()
    exact = first_order(module, inputs, targets, F.cross_entropy).gradients
    errors = [
        error(estimator(module, inputs, targets, F.cross_entropy, mu=mu, difference=difference).gradients, exact)
        for mu in SMOOTHING
    ]
    slope = np.polyfit(np.log(SMOOTHING), np.log(errors), 1)[0]
    assert order * 0.9 <= slope <= order * 1.1, f"slope {slope:.3f}, errors {errors}"
