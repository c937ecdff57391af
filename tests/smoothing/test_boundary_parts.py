"""Cosines, the sharing out of queries, estimators at a boundary, noise, hidden classifiers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn
from scoring import hide
from torch import Tensor, nn

from deepzero_core.data import ImageStore, Split
from deepzero_core.errors import RequestError
from deepzero_core.smoothing import label_table, noisy, relabelled
from deepzero_core.smoothing.methods import Estimator
from deepzero_core.smoothing.methods.cosines import Cosines
from deepzero_core.smoothing.methods.split import hardness, share_out
from deepzero_core.smoothing.noise import direction_generator


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 7), (2, 1, 5)], ids=str)
def test_cosines_are_the_orthonormal_transform_lowest_frequency_first(shape: tuple[int, int, int]) -> None:
    size = math.prod(shape)
    cosines = Cosines(shape, torch.empty(0, dtype=torch.float64))
    basis = cosines.images(torch.arange(size))
    torch.testing.assert_close(basis.flatten(1) @ basis.flatten(1).T, torch.eye(size, dtype=torch.float64))
    frequencies = []
    for image in basis:
        (channel, row, column) = torch.tensor(dctn(image.numpy(), norm="ortho", axes=(1, 2))).round().nonzero()[0]
        assert 0 <= channel < shape[0]
        frequencies.append(float((row / shape[1]) ** 2 + (column / shape[2]) ** 2))
    assert frequencies == sorted(frequencies)
    coefficients = torch.randn(2, size, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(cosines.sum(coefficients), torch.einsum("bk,kchw->bchw", coefficients, basis))


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e3)), min_size=1, max_size=12),
    total=st.integers(0, 400),
    most=st.integers(1, 40),
)
def test_queries_are_shared_out_to_the_last(weights: list[float], total: int, most: int) -> None:
    values = torch.tensor(weights, dtype=torch.float64)
    counts = share_out(values, total, most)
    assert int(counts.sum()) == min(total, len(weights) * most)
    assert int(counts.min()) >= 0
    assert int(counts.max()) <= most
    ordered = counts[values.argsort(descending=True, stable=True)]
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(ordered))


def test_shares_are_in_proportion_where_nothing_caps_them() -> None:
    assert share_out(torch.tensor([1.0, 5.0, 2.0]), 16, 100).tolist() == [2, 10, 4]
    assert share_out(torch.tensor([1.0, 5.0, 2.0]), 16, 7).tolist() == [3, 7, 6]


def test_hardness_is_the_squared_gradient_at_the_logits() -> None:
    logits = torch.randn(5, 4, generator=generator()).requires_grad_()
    labels = torch.tensor([0, 3, 1, 1, 2])
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(hardness(logits.detach(), labels).float(), logits.grad.square().sum(1))


SCALES = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def cubes(values: Tensor, owners: Tensor) -> Tensor:
    """Σ s·v³ + s·v of the example's own scale s."""
    return (SCALES[owners, None, None] * (values**3 + values)).sum((1, 2))


@pytest.mark.parametrize(
    ("queries", "difference", "order"),
    [
        (7, "forward", 1),
        (9, "forward", 1),
        (13, "central", 2),
        (13, "forward", 2),
        (16, "central", 2),
        (100, "forward", 2),
    ],
)
def test_all_coordinates_give_the_gradient_to_the_order_of_the_difference(
    queries: int, difference: str, order: int
) -> None:
    z = torch.rand(4, 2, 3, dtype=torch.float64, generator=generator())
    true = SCALES[:, None, None] * (3 * z**2 + 1)
    errors = []
    for mu in (1e-2, 1e-3):
        estimator = Estimator("cge", queries=queries, mu=mu, difference=difference)
        found = estimator.gradient(cubes, z, cubes(z, torch.arange(4)), generator())
        errors.append((found - true).abs().max().item())
    assert math.log10(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_few_coordinates_are_drawn_for_each_example_by_itself() -> None:
    z = torch.rand(4, 2, 3, dtype=torch.float64, generator=generator())
    estimator = Estimator("cge", queries=4, mu=1e-6)
    found = estimator.gradient(cubes, z, cubes(z, torch.arange(4)), generator(2))
    kept = found.flatten(1) != 0
    assert kept.sum(1).tolist() == [3] * 4
    assert len(kept.unique(dim=0)) > 1
    true = SCALES[:, None, None] * (3 * z**2 + 1)
    torch.testing.assert_close(found, torch.where(kept.view_as(z), true, 0.0), rtol=1e-4, atol=0)


def test_random_directions_converge_as_their_variance_says() -> None:
    """Var of the mean of q slopes: (d + 1)·‖g‖²/q in expectation, for a loss without curvature."""
    slope = torch.randn(1, 6, dtype=torch.float64, generator=generator())
    z = torch.zeros(2_000, 6, dtype=torch.float64)

    def linear(values: Tensor, _: Tensor) -> Tensor:
        return values @ slope[0]

    for queries in (5, 41):
        found = Estimator("rge", queries=queries).gradient(linear, z, linear(z, z), generator(1))
        error = (found - slope).square().sum(1).mean() / slope.square().sum()
        assert error.item() == pytest.approx(7 / (queries - 1), rel=0.1)
        torch.testing.assert_close(found.mean(0), slope[0], rtol=0, atol=0.15)


def test_a_gradient_does_not_depend_on_how_many_directions_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.rand(4, 2, 3, dtype=torch.float64, generator=generator())
    base = cubes(z, torch.arange(4))
    for estimator in (Estimator("rge", queries=20), Estimator("cge", queries=5), Estimator("cge", queries=29)):
        whole = estimator.gradient(cubes, z, base, generator(1))
        pieces = estimator.gradient(cubes, z, base, generator(1), widest=1 << 19)
        torch.testing.assert_close(whole, pieces, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 6, 24, 64, 2_000])
@pytest.mark.parametrize(
    ("estimator", "cost"),
    [
        (Estimator(), 1152),
        (Estimator(difference="central"), 1151),
        (Estimator("cge"), 1152),
        (Estimator("cge", queries=192), 192),
        (Estimator("cge", difference="central"), 1151),
        (Estimator("cge", queries=10, difference="central"), 9),
    ],
    ids=str,
)
def test_a_step_spends_its_budget_however_few_numbers_there_are(estimator: Estimator, cost: int, size: int) -> None:
    asked = 0

    def counted(values: Tensor, owners: Tensor) -> Tensor:
        nonlocal asked
        asked += len(values)
        return values.square().sum(1)

    z = torch.rand(2, size, dtype=torch.float64, generator=generator())
    found = estimator.gradient(counted, z, counted(z, torch.arange(2)), generator())
    assert (estimator.cost, asked) == (cost, 2 * cost)
    if estimator.name == "cge" and 2 * size < cost:
        torch.testing.assert_close(found, 2 * z, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "rgee"}, "did you mean 'rge'?"),
        ({"mu": 0.0}, "mu must be positive"),
        ({"difference": "backward"}, "unknown difference"),
        ({"queries": 1}, "at least 2 for a forward difference, not 1"),
        ({"queries": 2, "difference": "central"}, "at least 3 for a central difference, not 2"),
    ],
    ids=str,
)
def test_wrong_estimators_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Estimator(**wrong)


def test_noise_is_a_function_of_seed_and_step() -> None:
    images = torch.full((50, 1, 20, 20), 0.5)
    first, again, other, seeded = (noisy(images, 0.25, *at) for at in ((7, 3), (7, 3), (7, 4), (8, 3)))
    assert torch.equal(first, again)
    for different in (other, seeded):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), different.flatten()]))[0, 1]) < 0.05
    assert (first - images).std().item() == pytest.approx(0.25, rel=0.02)
    assert abs((first - images).mean().item()) < 0.01
    drawn = torch.randn(images.shape, generator=direction_generator(7, 3))
    assert abs(torch.corrcoef(torch.stack([first.flatten(), drawn.flatten()]))[0, 1]) < 0.05


def test_the_label_table_asks_for_every_image_once(victim: nn.Module, digits: ImageStore) -> None:
    box, split = hide(victim), digits.split("test")
    labels = label_table(box, split, batch_size=100)
    assert box.queries == len(split) == len(labels)
    renamed = relabelled(split, labels)
    assert isinstance(renamed, Split)
    agreement = (torch.from_numpy(split.labels.copy()) == labels).float().mean().item()
    assert 0.9 < agreement < 1.0
    assert torch.equal(torch.from_numpy(renamed.labels), labels)
    with pytest.raises(RequestError, match="the split has 360 images, but the labels have shape"):
        relabelled(split, labels[:3])
