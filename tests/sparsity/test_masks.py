"""Ratios and masks: exact counts, ties, determinism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.sparsity import draw_masks, layer_ratios, magnitude_scores, top_masks

NAMES = ("0.weight", "3.weight")


def module() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 7))


def test_one_global_threshold_gives_each_layer_its_share() -> None:
    scores = {"a": torch.tensor([[-5.0, 1.0], [2.0, 3.0]]), "b": torch.tensor([-4.0, -3.0, -2.0, 9.0])}
    assert layer_ratios(scores, 0.5) == {"a": 0.25, "b": 0.75}
    keep = top_masks(scores, 0.5)
    assert keep["a"].tolist() == [[False, True], [True, True]]
    assert keep["b"].tolist() == [False, False, False, True]


def test_of_equal_scores_the_first_are_removed() -> None:
    keep = top_masks({"a": torch.zeros(4), "b": torch.zeros(4)}, 0.625)
    assert keep["a"].tolist() == [False] * 4
    assert keep["b"].tolist() == [False, True, True, True]


def test_signed_scores_are_not_magnitudes() -> None:
    assert top_masks({"a": torch.tensor([-100.0, 0.5, 0.1])}, 1 / 3)["a"].tolist() == [False, True, True]


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    levels=st.integers(1, 50),
)
def test_exactly_the_asked_for_number_is_removed_and_a_draw_keeps_each_layers_count(
    sizes: list[int], sparsity: float, seed: int, levels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few levels: many ties.
    scores = {
        f"layer{i}": torch.randint(0, levels, (size,), generator=generator).float() for i, size in enumerate(sizes)
    }
    keep = top_masks(scores, sparsity)
    total = sum(sizes)
    assert sum(int(mask.sum()) for mask in keep.values()) == total - round(sparsity * total)
    kept_lowest = min((float(scores[n][m].min()) for n, m in keep.items() if m.any()), default=float("inf"))
    removed_highest = max((float(scores[n][~m].max()) for n, m in keep.items() if (~m).any()), default=float("-inf"))
    assert removed_highest <= kept_lowest

    ratios = layer_ratios(scores, sparsity)
    holder = nn.ParameterDict({name: nn.Parameter(score) for name, score in scores.items()})
    drawn = draw_masks(ratios, holder, generator)
    assert {name: int(mask.sum()) for name, mask in drawn.items()} == {n: int(m.sum()) for n, m in keep.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_drawn_masks_keep_the_counts_and_all_of_what_has_no_ratio(sparsity: float) -> None:
    net = module()
    ratios = layer_ratios(magnitude_scores(net), sparsity)
    assert tuple(ratios) == NAMES
    masks = draw_masks(ratios, net, torch.Generator().manual_seed(0))
    assert set(masks) == {name for name, _ in net.named_parameters()}
    for name, value in net.named_parameters():
        assert masks[name].dtype == torch.bool
        assert masks[name].shape == value.shape
        kept = value.numel() - round(ratios.get(name, 0.0) * value.numel())
        assert int(masks[name].sum()) == kept
    assert sum(int((~masks[name]).sum()) for name in NAMES) == round(sparsity * (90 + 140))


def test_masks_are_a_function_of_the_generator_and_not_of_the_order_of_ratios() -> None:
    net = module()
    ratios = dict.fromkeys(NAMES, 0.5)

    def draw(seed: int, which: dict[str, float]) -> Tensor:
        masks = draw_masks(which, net, torch.Generator().manual_seed(seed))
        return torch.cat([masks[name].reshape(-1) for name, _ in net.named_parameters()])

    state = torch.random.get_rng_state()
    assert torch.equal(draw(0, ratios), draw(0, dict(reversed(ratios.items()))))
    assert not torch.equal(draw(0, ratios), draw(1, ratios))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_coordinate_is_drawn_equally_often() -> None:
    net = nn.Linear(10, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    draws = 2000
    kept = sum(draw_masks({"weight": 0.7}, net, generator)["weight"].long() for _ in range(draws))
    # Binomial(2000, 0.3): standard deviation 20.5; five of them.
    assert bool(((kept - 0.3 * draws).abs() < 103).all())


def test_frozen_parameters_have_no_mask() -> None:
    net = module()
    net[1].requires_grad_(False)
    assert set(draw_masks({}, net, torch.Generator())) == {"0.weight", "0.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, 90, float("nan")])
def test_a_sparsity_that_is_no_share_is_refused(sparsity: float) -> None:
    with pytest.raises(RequestError, match="between 0 and 1"):
        layer_ratios({"a": torch.zeros(3)}, sparsity)


def test_no_scores_are_refused() -> None:
    with pytest.raises(RequestError, match="no scores"):
        layer_ratios({}, 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_named(value: float) -> None:
    with pytest.raises(WorkError, match="1 of the 2 scores of 'b' are not finite"):
        layer_ratios({"a": torch.zeros(3), "b": torch.tensor([0.0, value])}, 0.5)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"0.weigth": 0.5}, "'0.weigth' is not a trainable parameter.* did you mean '0.weight'"),
        ({"0.weight": 1.5}, "'0.weight' must be between 0 and 1"),
    ],
    ids=["name", "share"],
)
def test_impossible_ratios_are_refused(ratios: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        draw_masks(ratios, module(), torch.Generator())
