"""Ratios that make a step of sparse estimation cost a budget exactly."""

import pytest
import torch
from torch import Tensor, nn

from deepzero_core.errors import RequestError
from deepzero_core.models import build_denoiser
from deepzero_core.perturb.coordinates import count, resolve
from deepzero_core.sparsity import budget_ratios, draw_masks, maskable_parameters, random_scores, top_masks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(depth: int = 5, width: int = 16, channels: int = 1) -> nn.Module:
    return build_denoiser("dncnn", channels=channels, image_size=8, depth=depth, width=width)


def coordinates(module: nn.Module, ratios: dict[str, float]) -> int:
    return count(resolve(module, draw_masks(ratios, module, generator(1))))


@pytest.mark.parametrize("queries", [2, 3, 113, 114, 225, 226, 1152, 7_312, 7_313])
@pytest.mark.parametrize("seed", [0, 1])
def test_masks_leave_exactly_what_the_budget_pays_for(queries: int, seed: int) -> None:
    module = network()
    ratios = budget_ratios(random_scores(module, generator(seed)), module, queries)
    assert set(ratios) == {name for name, _ in module.named_parameters()}
    assert coordinates(module, ratios) == min(queries - 1, 160 + 3 * 2_336 + 144)


def test_the_papers_denoiser_costs_the_papers_budget() -> None:
    module = network(17, 64, 3)
    ratios = budget_ratios(random_scores(module, generator()), module, 1152)
    assert coordinates(module, ratios) == 1151


def test_a_central_difference_costs_two_queries_each() -> None:
    module = network()
    scores = random_scores(module, generator())
    for queries in (1151, 1152):
        assert coordinates(module, budget_ratios(scores, module, queries, difference="central")) == 575


def test_layers_share_the_budget_as_one_threshold_has_it() -> None:
    module = network()
    scores: dict[str, Tensor] = random_scores(module, generator())
    favoured = maskable_parameters(module)[1]
    scores[favoured] += 0.5
    ratios = budget_ratios(scores, module, 1152)
    unscored = 16 + 3 * 32
    expected = top_masks(scores, 1 - (1151 - unscored) / sum(score.numel() for score in scores.values()))
    for name, mask in expected.items():
        assert ratios[name] == pytest.approx(1 - mask.float().mean().item(), abs=1e-6)
    assert ratios[favoured] == min(ratios[name] for name in scores)


def test_parameters_without_scores_are_whole_or_have_half() -> None:
    module = network()
    scores = random_scores(module, generator())
    names = [name for name, _ in module.named_parameters() if name not in scores]
    roomy, tight = (budget_ratios(scores, module, queries) for queries in (225, 101))
    assert all(roomy[name] == 0 for name in names)
    sizes = {name: value.numel() for name, value in module.named_parameters()}
    assert sum(round((1 - tight[name]) * sizes[name]) for name in names) == 50
    assert all(tight[name] == pytest.approx(1 - 50 / 112, abs=1 / 16) for name in names)


def test_wrong_requests_are_refused() -> None:
    module = network()
    scores = random_scores(module, generator())
    with pytest.raises(RequestError, match="at least 2 for a forward difference, not 1"):
        budget_ratios(scores, module, 1)
    with pytest.raises(RequestError, match="at least 3 for a central difference, not 2"):
        budget_ratios(scores, module, 2, difference="central")
    with pytest.raises(RequestError, match=r"'layers\.9' is not a trainable parameter"):
        budget_ratios({"layers.9": torch.ones(1)}, module, 10)
