"""What each precision is good for, with kernels and without, on three conv–BN–ReLU–pool blocks of 18 channels.

Relative error ‖ĝ − g‖/‖g‖ over 12 coordinates of every parameter, batch 32, BatchNorm in training mode; measured, the
larger of kernels and torch's operators:

              against float64 CGE, μ = 5e-3      against the derivative, μ = 1e-6
    value     4e-5
    float32   5e-6                               1e-6
    bfloat16  2e-3                               2e-3
"""

import copy
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from deepzero_core import cge, first_order, reference
from deepzero_core.errors import RequestError
from deepzero_core.perturb.estimate import PRECISIONS
from deepzero_core.perturb.native import gain, program
from deepzero_core.perturb.regions import region

AGAINST_FLOAT64 = {"value": 2e-3, "float32": 1e-4, "bfloat16": 1e-2}
AGAINST_DERIVATIVE = {"float32": 1e-5, "bfloat16": 1e-2}

MU, SMALL_MU = 5e-3, 1e-6


def block(channels: int) -> list[nn.Module]:
    """Without a bias: before BatchNorm its gradient is zero, and has no relative error."""
    return [nn.Conv2d(channels, 18, 3, padding=1, bias=False), nn.BatchNorm2d(18), nn.ReLU(), nn.MaxPool2d(2)]


@cache
def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(*block(3), *block(18), *block(18), nn.Flatten(), nn.Linear(18 * 4, 10))
    return module, torch.randn(32, 3, 16, 16), torch.randint(10, (32,))


@cache
def coordinates() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randperm(p.numel(), generator=generator)[:12] for name, p in network()[0].named_parameters()}


def at_coordinates(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten()[indices].double() for name, indices in coordinates().items()])


def in_float64() -> tuple[nn.Module, Tensor, Tensor]:
    module, inputs, targets = network()
    return copy.deepcopy(module).double(), inputs.double(), targets


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels round wherever they can, whether or not it is faster here."""
    monkeypatch.setattr(gain, "bfloat16_pays", program.has_bfloat16)


@cache
def exact(mu: float) -> Tensor:
    return at_coordinates(reference.cge(*in_float64(), F.cross_entropy, mu=mu, coordinates=coordinates()).gradients)


@cache
def derivative() -> Tensor:
    return at_coordinates(first_order(*in_float64(), F.cross_entropy).gradients)


def estimated(precision: str, mu: float) -> Tensor:
    found = cge(*network(), F.cross_entropy, mu=mu, coordinates=coordinates(), precision=precision)
    return at_coordinates(found.gradients)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_error_against_float64(precision: str, arithmetic: str) -> None:
    found = error(estimated(precision, MU), exact(MU))
    assert found < AGAINST_FLOAT64[precision]


@pytest.mark.parametrize("precision", AGAINST_DERIVATIVE)
def test_error_against_the_derivative(precision: str, arithmetic: str) -> None:
    """At a millionth the estimate is the derivative, not a secant; no subtraction of losses resolves that step."""
    found = error(estimated(precision, SMALL_MU), derivative())
    assert found < AGAINST_DERIVATIVE[precision]


def test_bfloat16_rounds_the_change_and_nothing_else(arithmetic: str) -> None:
    """It differs from float32, and as much at a small step as at a large one."""
    errors = [error(estimated("bfloat16", mu), estimated("float32", mu)) for mu in (MU, SMALL_MU)]
    assert all(1e-4 < found < 1e-2 for found in errors)
    assert 1 / 3 < errors[0] / errors[1] < 3


@pytest.mark.skipif(not program.has_bfloat16(), reason="this machine has no kernels in bfloat16")
def test_long_chains_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten convolutions in a row, errors of which would add up to 3.0e-2 where targets are random."""
    torch.manual_seed(0)
    layers = [[nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()] for _ in range(10)]
    module = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), *(part for layer in layers for part in layer), nn.Flatten(2))
    inputs, targets = torch.randn(16, 3, 12, 12), torch.randn(16, 24, 144)
    generator = torch.Generator().manual_seed(0)
    chosen = {
        name: torch.randperm(p.numel(), generator=generator)[:12]
        for name, p in module.named_parameters()
        if name.endswith("weight") and int(name.split(".")[0]) in (0, 1, 2, 4, 5)
    }

    def estimate(precision: str) -> Tensor:
        found = cge(module, inputs, targets, F.mse_loss, mu=SMALL_MU, coordinates=chosen, precision=precision)
        return torch.cat([found.gradients[name].flatten()[indices].double() for name, indices in chosen.items()])

    exactly, found = estimate("float32"), estimate("bfloat16")
    monkeypatch.setattr(region, "_CHAIN", 99)
    assert error(found, exactly) < 1e-6 < 1e-2 < error(estimate("bfloat16"), exactly)


def separate_passes(mu: float) -> Tensor:
    """Mean over the examples of l(θ + μeᵢ) − l(θ) in float32, two plain forward passes each."""
    module, inputs, targets = network()
    parameters = dict(module.named_parameters())
    each = partial(F.cross_entropy, target=targets, reduction="none")
    slopes = []
    with torch.no_grad():
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        before = each(functional_call(module, {**parameters, **buffers}, (inputs,)))
        for name, indices in coordinates().items():
            for index in indices:
                moved = parameters[name].clone()
                moved.view(-1)[index] += mu
                buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
                after = each(functional_call(module, {**parameters, **buffers, name: moved}, (inputs,)))
                slopes.append((after - before).mean() / mu)
    return torch.stack(slopes).double()


@pytest.mark.parametrize("mu", [MU, 1e-4])
def test_values_round_as_separate_passes_do(mu: float, arithmetic: str) -> None:
    ours, theirs = (error(found, exact(mu)) for found in (estimated("value", mu), separate_passes(mu)))
    assert 1 / 5 < ours / theirs < 5
    assert error(estimated("float32", mu), exact(mu)) < ours / 3, "that is what the other form is for"


def test_in_float64_every_precision_is_exact() -> None:
    for precision in ("value", "float32"):
        found = cge(*in_float64(), F.cross_entropy, coordinates=coordinates(), precision=precision)
        assert error(at_coordinates(found.gradients), exact(MU)) < 1e-9


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown precision 'bfloat61': did you mean 'bfloat16'"):
        cge(*network(), F.cross_entropy, precision="bfloat61")
