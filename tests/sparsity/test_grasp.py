"""Exact GraSP: the score is what the Hessian says, and predicts what removal does to the gradient flow."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepzero_core.errors import RequestError
from deepzero_core.sparsity import grasp_scores, magnitude_scores, maskable_parameters, random_scores

Problem = tuple[nn.Module, Tensor, Tensor]


def mlp(seed: int) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        return net, torch.randn(32, 6).double(), torch.randint(0, 3, (32,))


def convolutional(seed: int) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(3 * 16, 3)
        ).double()
        return net, torch.randn(24, 1, 4, 4).double(), torch.randint(0, 3, (24,))


def gradient_flow(module: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """‖∇l(θ)‖² over all trainable parameters."""
    loss = F.cross_entropy(module(inputs), targets)
    return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(module.parameters())))


def with_scaled_weights(module: nn.Module, name: str, indices: Tensor, factor: float) -> nn.Module:
    changed = copy.deepcopy(module)
    with torch.no_grad():
        changed.get_parameter(name).view(-1)[indices] *= factor
    return changed


@pytest.mark.parametrize("problem", [mlp, convolutional])
def test_score_is_minus_half_the_slope_of_the_gradient_flow_towards_removal(
    problem: Callable[[int], Problem],
) -> None:
    module, inputs, targets = problem(0)
    step = 1e-5
    for name, score in grasp_scores(module, inputs, targets, F.cross_entropy).items():
        for index in range(0, score.numel(), 5):
            ahead, behind = (
                gradient_flow(with_scaled_weights(module, name, torch.tensor([index]), factor), inputs, targets)
                for factor in (1 - step, 1 + step)
            )
            slope = (ahead - behind) / (2 * step)
            assert float(score.view(-1)[index]) == pytest.approx(-slope / 2, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("problem", [mlp, convolutional])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("removed", [1, 3])
def test_removing_the_lowest_scores_raises_the_gradient_flow_and_the_highest_lowers_it(
    problem: Callable[[int], Problem], seed: int, removed: int
) -> None:
    module, inputs, targets = problem(seed)
    before = gradient_flow(module, inputs, targets)
    scores = grasp_scores(module, inputs, targets, F.cross_entropy)
    name = max(scores, key=lambda layer: float(scores[layer].abs().max()))
    order = scores[name].view(-1).argsort()
    lowest, highest = (
        gradient_flow(with_scaled_weights(module, name, indices, 0.0), inputs, targets)
        for indices in (order[:removed], order[-removed:])
    )
    assert lowest > before
    assert highest < before


def test_a_loss_per_example_scores_as_its_mean() -> None:
    module, inputs, targets = mlp(1)
    mean = grasp_scores(module, inputs, targets, F.cross_entropy)
    per_example = grasp_scores(module, inputs, targets, lambda out, true: F.cross_entropy(out, true, reduction="none"))
    for name in mean:
        torch.testing.assert_close(per_example[name], mean[name], rtol=1e-9, atol=1e-14)


def test_attention_and_a_parameter_the_loss_does_not_use() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 12)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).chunk(3, dim=-1)
            heads = [part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (q, k, v)]  # [B, heads, tokens, 2]
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2).mean(dim=1)

    generator = torch.Generator().manual_seed(0)
    scores = grasp_scores(
        Attention(), torch.randn(5, 3, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0]), F.cross_entropy
    )
    assert scores["project.weight"].abs().max() > 0
    assert not scores["unused.weight"].any()


def test_a_loss_linear_in_the_parameters_has_no_curvature() -> None:
    module = nn.Linear(3, 1)
    scores = grasp_scores(module, torch.ones(4, 3), torch.ones(4, 1), lambda out, true: (out * true).mean())
    assert not scores["weight"].any()


def test_scores_are_computed_under_no_grad_too() -> None:
    module, inputs, targets = mlp(0)
    outside = grasp_scores(module, inputs, targets, F.cross_entropy)
    with torch.no_grad():
        inside = grasp_scores(module, inputs, targets, F.cross_entropy)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_only_trainable_weights_of_convolutions_and_linear_layers_are_maskable_and_shared_ones_once() -> None:
    module = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "conv": nn.Conv1d(2, 4, 3),
            "up": nn.ConvTranspose2d(4, 2, 3),
            "norm": nn.BatchNorm1d(4),
            "frozen": nn.Linear(4, 4),
            "head": nn.Linear(4, 5),
            "weight_normed": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        }
    )
    module["head"].weight = module["embedding"].weight
    module["frozen"].weight.requires_grad_(False)
    assert maskable_parameters(module) == ["embedding.weight", "conv.weight", "up.weight"]


def test_magnitude_and_random_scores() -> None:
    module, _, _ = convolutional(0)
    magnitude = magnitude_scores(module)
    assert list(magnitude) == ["0.weight", "4.weight"]
    assert torch.equal(magnitude["0.weight"], module[0].weight.abs())
    first, again, other = (random_scores(module, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    for name in magnitude:
        assert first[name].shape == module.get_parameter(name).shape
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_a_module_with_nothing_to_prune_is_refused() -> None:
    module = nn.BatchNorm1d(3)
    with pytest.raises(RequestError, match="nothing to prune"):
        magnitude_scores(module)
    with pytest.raises(RequestError, match="nothing to prune"):
        grasp_scores(module, torch.ones(2, 3), torch.ones(2, 3), F.mse_loss)
