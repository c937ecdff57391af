"""ZO-GraSP beside exact GraSP: common directions approach it with q, independent ones do not."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from deepzero_core.errors import RequestError
from deepzero_core.sparsity import grasp_scores, zo_grasp_scores

QUERIES = (8, 32, 128, 512)
SEEDS = range(10)


def problem(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        return net, torch.randn(32, 6), torch.randint(0, 3, (32,))


def flat(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat([score.reshape(-1) for score in scores.values()])


def mean_rank_correlation(queries: int, *, common_directions: bool) -> float:
    """Spearman's ρ of ZO-GraSP with GraSP over 72 weights (83 trainable parameters), mean over seeds."""
    total = 0.0
    for seed in SEEDS:
        module, inputs, targets = problem(seed)
        exact = grasp_scores(module, inputs, targets, F.cross_entropy)
        estimated = zo_grasp_scores(
            module,
            inputs,
            targets,
            F.cross_entropy,
            queries=queries,
            generator=torch.Generator().manual_seed(seed),
            common_directions=common_directions,
        )
        assert list(estimated) == list(exact)
        total += float(spearmanr(flat(exact), flat(estimated)).statistic)
    return total / len(SEEDS)


def test_rank_correlation_rises_with_queries_under_common_directions_and_not_under_independent_ones() -> None:
    # ρ of one seed scatters by 0.06–0.18, its mean over ten seeds by a third of that. Measured:
    # common 0.14 0.32 0.58 0.80, independent within ±0.06.
    common = [mean_rank_correlation(queries, common_directions=True) for queries in QUERIES]
    independent = [mean_rank_correlation(queries, common_directions=False) for queries in QUERIES[1::2]]
    assert all(more > fewer for fewer, more in itertools.pairwise(common)), common
    assert common[-1] > 0.7, common
    assert common[-1] - common[0] > 0.4, common
    assert all(abs(correlation) < 0.25 for correlation in independent), independent
    assert common[-1] - independent[-1] > 0.5, (common, independent)


def stateful() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8, 3)
        )
        return net, torch.randn(8, 1, 4, 4), torch.randint(0, 3, (8,))


@pytest.mark.parametrize("criterion", ["grasp", "zo-grasp"])
def test_parameters_buffers_gradients_and_the_global_random_state_are_untouched(criterion: str) -> None:
    module, inputs, targets = stateful()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    if criterion == "grasp":
        scores = grasp_scores(module, inputs, targets, F.cross_entropy)
    else:
        scores = zo_grasp_scores(
            module, inputs, targets, F.cross_entropy, queries=4, generator=torch.Generator().manual_seed(0)
        )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.grad is None for value in module.parameters())
    assert module.training
    assert not any(score.requires_grad for score in scores.values())
    assert {name: score.shape for name, score in scores.items()} == {
        name: module.get_parameter(name).shape for name in ("0.weight", "5.weight")
    }


def test_scores_are_a_function_of_the_generator() -> None:
    module, inputs, targets = problem(0)

    def scores(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return flat(zo_grasp_scores(module, inputs, targets, F.cross_entropy, queries=4, generator=generator))

    assert torch.equal(scores(1), scores(1))
    assert not torch.equal(scores(1), scores(2))


@pytest.mark.parametrize("common_directions", [True, False])
def test_the_generator_moves_on_so_that_a_second_call_draws_anew(common_directions: bool) -> None:
    module, inputs, targets = problem(0)
    generator = torch.Generator().manual_seed(0)
    first, second = (
        flat(
            zo_grasp_scores(
                module,
                inputs,
                targets,
                F.cross_entropy,
                queries=4,
                generator=generator,
                common_directions=common_directions,
            )
        )
        for _ in range(2)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mu": 0.0}, "mu.* must be positive"),
        ({"mu": float("nan")}, "mu.* must be positive"),
        ({"queries": 0}, "queries"),
    ],
    ids=["mu-zero", "mu-nan", "no-queries"],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    module, inputs, targets = problem(0)
    with pytest.raises(RequestError, match=message):
        zo_grasp_scores(module, inputs, targets, F.cross_entropy, generator=torch.Generator(), **wrong)
