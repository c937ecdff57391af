"""Slopes from any number of evaluations: exact where they can be, none of them far away, none twice at one place."""

import math

import pytest
import torch
from torch import Tensor

from deepzero_core.estimators.stencil import Stencil


def slope(function: object, count: int, most: int, mu: float) -> float:
    stencil = Stencil(most)
    at = torch.tensor([stencil.step(number) for number in range(most)], dtype=torch.float64)
    changes = function(mu * at) - function(torch.zeros(1, dtype=torch.float64))
    return float((stencil.weights(count) * changes).sum() / mu)


@pytest.mark.parametrize("most", range(1, 12))
def test_all_steps_are_different_and_within_mu(most: int) -> None:
    steps = [Stencil(most).step(number) for number in range(most)]
    assert len(set(steps)) == most and steps[:2] == [1.0, -1.0][:most]
    assert all(0 < abs(step) <= 1 for step in steps)


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_one_is_the_forward_difference_and_two_the_central_one(most: int) -> None:
    assert Stencil(most).weights(0).count_nonzero() == 0
    assert Stencil(most).weights(1)[0] == 1 and Stencil(most).weights(1).count_nonzero() == 1
    if most > 1:
        wanted = torch.zeros(most, dtype=torch.float64)
        wanted[:2] = torch.tensor([0.5, -0.5])
        torch.testing.assert_close(Stencil(most).weights(2), wanted)


@pytest.mark.parametrize(("count", "order"), [(1, 1), (2, 2), (3, 2), (4, 2), (7, 2), (10, 2)])
def test_the_error_is_of_the_order_of_the_difference(count: int, order: int) -> None:
    def curved(t: Tensor) -> Tensor:
        return (0.3 + t).exp()

    errors = [abs(slope(curved, count, 10, mu) - math.exp(0.3)) for mu in (1e-2, 1e-3)]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    if count > 1:
        assert errors[0] <= abs(slope(curved, 2, 10, 1e-2) - math.exp(0.3)) * 1.5


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_a_parabola_has_its_own_slope(count: int) -> None:
    assert slope(lambda t: 2 * t + 5 * t**2, count, 8, 0.1) == pytest.approx(2, rel=1e-10)


def test_more_evaluations_round_less() -> None:
    """Of answers with independent noise the variance is Σ w²."""
    variances = [float(Stencil(40).weights(count).square().sum()) for count in (2, 4, 8, 16, 32, 40)]
    assert variances[0] == pytest.approx(0.5)
    assert variances == sorted(variances, reverse=True)
    assert variances[-1] < 0.1
