"""Random-direction estimators: by their formula, by convergence under a query budget, by their generator."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import GradientEstimate, first_order, forward_gradient, reference, rge

Estimator = Callable[..., GradientEstimate]


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    return module, torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_rge_is_the_reference_for_the_same_generator(difference: str) -> None:
    module, inputs, targets = network()
    arguments = {"queries": 7, "mu": 1e-3, "difference": difference}
    found = rge(module, inputs, targets, F.cross_entropy, generator=seeded(), **arguments)
    expected = reference.rge(module, inputs, targets, F.cross_entropy, generator=seeded(), **arguments)
    torch.testing.assert_close(flat(found.gradients), flat(expected.gradients), rtol=1e-9, atol=1e-12)
    assert found.queries == expected.queries == 1 + 7 * (2 if difference == "central" else 1)


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_rge_by_hand(difference: str) -> None:
    """A linear loss l = Σ wᵢxᵢ has the slope xᵀu along u, whatever μ."""
    torch.manual_seed(0)
    module, inputs = nn.Linear(6, 1, bias=False).double(), torch.randn(1, 6, dtype=torch.float64)
    found = rge(
        module, inputs, inputs, lambda y, _: y.sum(), queries=3, mu=0.1, generator=seeded(4), difference=difference
    )
    drawn = torch.randint(2**63 - 1, (3,), generator=seeded(4)).tolist()
    directions = [torch.randn(1, 6, generator=seeded(seed), dtype=torch.float64) for seed in drawn]
    expected = sum((inputs * u).sum() * u for u in directions) / 3
    torch.testing.assert_close(found.gradients["weight"], expected, rtol=1e-9, atol=1e-12)


def of_rge(difference: str) -> Estimator:
    return lambda *args, **kwargs: rge(*args, mu=1e-4, difference=difference, **kwargs)


ESTIMATORS = {"rge": of_rge("forward"), "rge_central": of_rge("central"), "forward_gradient": forward_gradient}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_error_is_the_root_of_dimension_over_queries(name: str) -> None:
    """E‖ĝ − g‖² = (d + 1)/q·‖g‖² for Gaussian directions: at two budgets, the mean over 16 draws within 30 %."""
    module, inputs, targets = network()
    exact = flat(first_order(module, inputs, targets, F.cross_entropy).gradients)
    for queries in (8, 72):
        draws = [
            flat(
                ESTIMATORS[name](
                    module, inputs, targets, F.cross_entropy, queries=queries, generator=seeded(seed)
                ).gradients
            )
            for seed in range(16)
        ]
        squared = torch.stack([(draw - exact).square().sum() / exact.square().sum() for draw in draws]).mean()
        ratio = squared.sqrt() / math.sqrt((exact.numel() + 1) / queries)
        assert 0.7 < ratio < 1.3, f"{queries} queries: {ratio:.2f} of what theory says"


def test_forward_gradient_is_unbiased() -> None:
    """Every coordinate of the mean of 1,200 directions within 4.5 of its own standard errors of the gradient."""
    module, inputs, targets = network()
    exact = flat(first_order(module, inputs, targets, F.cross_entropy).gradients)
    draws = torch.stack(
        [
            flat(
                forward_gradient(module, inputs, targets, F.cross_entropy, queries=4, generator=seeded(seed)).gradients
            )
            for seed in range(300)
        ]
    )
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 4.5 * standard_error).all()


def test_forward_gradient_is_the_limit_of_rge() -> None:
    module, inputs, targets = network()
    limit = forward_gradient(module, inputs, targets, F.cross_entropy, queries=5, generator=seeded())
    close = rge(module, inputs, targets, F.cross_entropy, queries=5, mu=1e-5, generator=seeded(), difference="central")
    torch.testing.assert_close(flat(close.gradients), flat(limit.gradients), rtol=1e-6, atol=1e-8)
    assert limit.queries == 6


@pytest.mark.parametrize("name", ESTIMATORS)
def test_directions_are_the_generators_alone(name: str) -> None:
    """The global generator neither matters nor moves; the estimator's own goes on, and another seed is another ĝ."""
    module, inputs, targets = network()
    generator = seeded(3)

    def estimate(generator: torch.Generator) -> Tensor:
        return flat(
            ESTIMATORS[name](module, inputs, targets, F.cross_entropy, queries=3, generator=generator).gradients
        )

    torch.manual_seed(1)
    first = estimate(generator)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(after, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, estimate(seeded(3)))
    assert not torch.equal(first, estimate(generator))
    assert not torch.equal(first, estimate(seeded(4)))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_dropout_is_the_same_in_every_query(name: str) -> None:
    """With masks redrawn between the queries the difference over μ = 1e-4 would be thousands."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2))
    inputs, targets = torch.randn(8, 4), torch.randint(2, (8,))
    found = ESTIMATORS[name](module, inputs, targets, F.cross_entropy, queries=20, generator=seeded())
    assert flat(found.gradients).abs().max() < 20
