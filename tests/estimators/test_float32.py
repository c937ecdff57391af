"""float32 differences against float64 ones: the engine's form does not cancel, the difference of two losses does.

Relative error ‖ĝ₃₂ − ĝ₆₄‖/‖ĝ₆₄‖ over 16 coordinates of each parameter of two conv–BN–ReLU–max-pool blocks and a linear
layer under cross-entropy.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, first_order, reference

# The largest error over the parameters by μ: measured 8e-6, 7e-5 and 1.3e-6, times three. At the larger μ it is that of
# ReLUs and arg-maxes whose kink lies within the rounding of the values; at the smallest hardly any kink is reached.
TOLERANCE = {5e-3: 2.5e-5, 1e-4: 2e-4, 1e-6: 4e-6}

Gradients = dict[str, Tensor]


def block(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, 18, 3, padding=1, bias=False), nn.BatchNorm2d(18), nn.ReLU(), nn.MaxPool2d(2)]


def network() -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """No convolution has a bias: before BatchNorm its gradient is zero, and has no relative error."""
    torch.manual_seed(0)
    module = nn.Sequential(*block(3), *block(18), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(18, 10))
    inputs, targets = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
    generator = torch.Generator().manual_seed(0)
    names = {n: torch.randperm(p.numel(), generator=generator)[:16] for n, p in module.named_parameters()}
    return module, inputs, targets, names


def errors(found: Gradients, expected: Gradients, coordinates: dict[str, Tensor]) -> dict[str, float]:
    chosen = {name: (found[name].flatten()[i].double(), expected[name].flatten()[i]) for name, i in coordinates.items()}
    return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in chosen.items()}


@pytest.mark.parametrize("mu", TOLERANCE)
def test_float32_engine_against_float64(mu: float) -> None:
    module, inputs, targets, coordinates = network()
    wide = copy.deepcopy(module).double()
    exact = reference.cge if mu == 5e-3 else cge  # the two agree in float64; one μ is checked against the reference
    found = cge(module, inputs, targets, F.cross_entropy, mu=mu, coordinates=coordinates)
    expected = exact(wide, inputs.double(), targets, F.cross_entropy, mu=mu, coordinates=coordinates)
    assert all(gradient.dtype == torch.float32 for gradient in found.gradients.values())
    for name, error in errors(found.gradients, expected.gradients, coordinates).items():
        assert error < TOLERANCE[mu], f"{name}: {error:.1e}"


def test_at_a_millionth_the_engine_is_the_derivative_and_the_value_form_noise() -> None:
    module, inputs, targets, coordinates = network()
    wide = copy.deepcopy(module).double()
    exact = first_order(wide, inputs.double(), targets, F.cross_entropy).gradients
    found = cge(module, inputs, targets, F.cross_entropy, mu=1e-6, coordinates=coordinates)
    noise = reference.cge(module, inputs, targets, F.cross_entropy, mu=1e-6, coordinates=coordinates)
    of_engine = errors(found.gradients, exact, coordinates)
    of_values = errors(noise.gradients, exact, coordinates)
    for name in coordinates:
        # Measured: engine at most 1.0e-5 (the secant's own bias), values at least 2.
        assert of_engine[name] < 3e-5, f"{name}: {of_engine[name]:.1e}"
        assert of_values[name] > 0.5, f"{name}: {of_values[name]:.1e}"
