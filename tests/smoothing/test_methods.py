"""Every method's gradient against plain backpropagation, its queries, and what it must not touch."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scoring import hide
from torch import Tensor, nn

from deepzero_core import reference
from deepzero_core.errors import RequestError
from deepzero_core.models import Autoencoder, build_denoiser
from deepzero_core.smoothing import noisy
from deepzero_core.smoothing.losses import stability
from deepzero_core.smoothing.methods import (
    DeepZeroDS,
    DeepZeroSplit,
    Estimator,
    FirstOrderDS,
    Pretraining,
    ZerothOrderAEDS,
    ZerothOrderDS,
    denoiser_and_encoder,
    denoiser_scores,
)
from deepzero_core.sparsity import budget_ratios, draw_masks
from deepzero_core.training import Batch

SIGMA, SEED = 0.25, 9
SHAPE = (1, 6, 5)
PIXELS = 30
EVERY_PIXEL = Estimator("cge", mu=1e-6, difference="central")

Build = Callable[[], nn.Module]


def relative_error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    square = sum((found[name] - value).square().sum() for name, value in true.items())
    return math.sqrt(square / sum(value.square().sum() for value in true.values()))


def inputs(batch: Batch) -> Tensor:
    return noisy(batch.inputs, SIGMA, SEED, batch.number)


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize(
    "source",
    [
        lambda f, w: FirstOrderDS(f, SIGMA, SEED, reconstruction=w),
        lambda f, w: ZerothOrderDS(hide(f), SHAPE, SIGMA, SEED, EVERY_PIXEL, reconstruction=w),
        lambda f, w: DeepZeroSplit(hide(f), SHAPE, SIGMA, SEED, mu=1e-6, reconstruction=w),
        lambda f, w: DeepZeroDS(hide(f), SIGMA, SEED, mu=1e-6, difference="central", reconstruction=w),
    ],
    ids=["fo-ds", "zo-ds", "split", "deepzero"],
)
def test_with_queries_enough_every_method_has_the_exact_gradient(
    source: Callable[[nn.Module, float], Any],
    weight: float,
    smooth: nn.Module,
    batch: Batch,
    denoiser: Build,
    exact: Callable[..., dict[str, Tensor]],
) -> None:
    module = denoiser()
    true = exact(module, smooth, inputs(batch), batch, weight)
    estimate = source(smooth, weight).estimate(module, batch, None)
    assert estimate.gradients.keys() == true.keys()
    assert relative_error(estimate.gradients, true) < 1e-7
    # Loss and outputs are those of a plain pass, and BatchNorm's statistics are the batch's, once.
    plain = copy.deepcopy(module)
    denoised = plain(inputs(batch))
    logits = smooth(denoised)
    expected = stability(logits, batch.targets) + weight * (denoised - batch.inputs).square().flatten(1).sum(1)
    assert estimate.loss == pytest.approx(expected.mean().item(), rel=1e-9)
    torch.testing.assert_close(estimate.outputs, logits)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(estimate.buffers[name], buffer)


def autoencoding(weights: int = 7) -> tuple[nn.Module, nn.Module]:
    """Denoiser with encoder, and decoder, for 9×8 images and a latent of 6."""
    autoencoder = build_denoiser("autoencoder", channels=1, image_size=(9, 8), latent=6, width=3, seed=weights)
    assert isinstance(autoencoder, Autoencoder)
    autoencoder.double().decoder.eval()
    denoiser = build_denoiser("unet", channels=1, image_size=(9, 8), depth=1, width=3, seed=weights).double()
    return denoiser_and_encoder(denoiser, autoencoder), autoencoder.decoder


@pytest.fixture
def wider() -> tuple[nn.Module, Batch]:
    """A smooth classifier of 9×8 images and a batch with its labels."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        smooth = nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Tanh(), nn.Linear(9, 4)).double().eval()
    images = torch.rand(8, 1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return smooth, Batch.of(5, 1, 2, images, smooth(images).argmax(1))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_all_coordinates_of_the_latent_give_the_exact_gradient(wider: tuple[nn.Module, Batch], weight: float) -> None:
    (smooth, batch), (network, decoder) = wider, autoencoding()
    source = ZerothOrderAEDS(hide(smooth), decoder, 6, SIGMA, SEED, EVERY_PIXEL, reconstruction=weight)
    copied = copy.deepcopy(network)
    images = decoder(copied(inputs(batch)))
    distance = (images - batch.inputs).square().sum() / len(images)
    (nn.functional.cross_entropy(smooth(images), batch.targets) + weight * distance).backward()
    true = {name: value.grad for name, value in copied.named_parameters()}
    last = sum(1 for name in true if name.startswith("denoiser.") and true[name].abs().max() > 0)
    assert last == 1, "the denoiser starts at the identity, where only its last convolution has a gradient"
    estimate = source.estimate(network, batch, None)
    assert relative_error(estimate.gradients, true) < 1e-7
    assert estimate.queries == 1151


def test_first_order_goes_through_a_decoder_too(wider: tuple[nn.Module, Batch]) -> None:
    """FO-AE-DS: the bound of ZO-AE-DS."""
    (smooth, batch), (network, decoder) = wider, autoencoding()
    found = FirstOrderDS(nn.Sequential(decoder, smooth).eval(), SIGMA, SEED).estimate(network, batch, None)
    true = ZerothOrderAEDS(hide(smooth), decoder, 6, SIGMA, SEED, EVERY_PIXEL).estimate(network, batch, None)
    assert relative_error(found.gradients, true.gradients) < 1e-6


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_deepzero_is_sparse_cge_of_the_reference(
    smooth: nn.Module, batch: Batch, denoiser: Build, difference: str, weight: float
) -> None:
    module = denoiser()
    masks = draw_masks({"layers.1.0.weight": 0.5, "layers.3.weight": 0.8}, module, torch.Generator().manual_seed(0))
    source = DeepZeroDS(hide(smooth), SIGMA, SEED, mu=1e-3, difference=difference, reconstruction=weight)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        distance = (outputs - batch.inputs).square().flatten(1).sum(1)
        return stability(smooth(outputs), targets) + weight * distance

    expected = reference.cge(
        module, inputs(batch), batch.targets, loss, mu=1e-3, coordinates=masks, difference=difference
    )
    for _ in range(2):  # the second time with what was traced the first
        found = source.estimate(module, batch, masks)
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-6, atol=1e-9)
        assert found.queries == expected.queries == source.cost(module, masks)


def test_the_split_converges_with_its_budget(
    smooth: nn.Module, batch: Batch, denoiser: Build, exact: Callable[..., dict[str, Tensor]]
) -> None:
    module = denoiser()
    true = exact(module, smooth, inputs(batch), batch)
    errors = {}
    for queries in (4, 11, 21, 31, 46, 61):
        source = DeepZeroSplit(hide(smooth), SHAPE, SIGMA, SEED, queries, mu=1e-5)
        errors[queries] = relative_error(source.estimate(module, batch, None).gradients, true)
    assert sorted(errors.values(), reverse=True) == list(errors.values())
    for queries in (62, 91, 300):  # further evaluations, within the same step
        source = DeepZeroSplit(hide(smooth), SHAPE, SIGMA, SEED, queries, mu=1e-5)
        assert relative_error(source.estimate(module, batch, None).gradients, true) < 1e-7
    assert errors[31] < 1e-3  # forward differences of every coefficient: O(μ)
    assert errors[61] < 1e-7  # central ones: O(μ²)


@pytest.mark.parametrize("queries", [31, 40, 61, 95, 192])
def test_the_split_spends_what_it_has(queries: int, smooth: nn.Module, batch: Batch, denoiser: Build) -> None:
    source = DeepZeroSplit(hide(smooth), SHAPE, SIGMA, SEED, queries)
    module = denoiser()
    source.estimate(module, batch, None)  # learning the shape of the answers costs a question, once
    before = source.classifier.queries
    assert source.estimate(module, batch, None).queries == source.cost(module, None) == queries
    assert source.classifier.queries - before == queries * len(batch.inputs)


def test_the_split_errs_less_than_random_directions_with_the_same_queries(
    victim: nn.Module, clean: Any, pretrained: Callable[[str], nn.Module]
) -> None:
    module = pretrained("dncnn")
    white, box = FirstOrderDS(victim, SIGMA, SEED), hide(victim)
    for queries in (9, 17, 33, 65, 129):
        errors: dict[str, list[float]] = {"split": [], "zo-ds": []}
        for step in range(4):
            batch = Batch.of(step, 0, step, *clean.batch(0, step))
            true = white.estimate(module, batch, None).gradients
            split = DeepZeroSplit(box, (1, 8, 8), SIGMA, SEED, queries)
            random = ZerothOrderDS(box, (1, 8, 8), SIGMA, SEED, Estimator("rge", queries))
            for name, source in (("split", split), ("zo-ds", random)):
                errors[name].append(relative_error(source.estimate(module, batch, None).gradients, true))
        assert sum(errors["split"]) < 0.5 * sum(errors["zo-ds"]), queries


BUDGET = 40
METHODS: dict[str, Callable[[nn.Module, nn.Module, int], Any]] = {
    "zo-ds": lambda f, _, seed: ZerothOrderDS(hide(f), (1, 9, 8), SIGMA, seed, Estimator("rge", BUDGET)),
    "zo-ds-cge": lambda f, _, seed: ZerothOrderDS(hide(f), (1, 9, 8), SIGMA, seed, Estimator("cge", BUDGET)),
    "zo-ae-ds": lambda f, dec, seed: ZerothOrderAEDS(hide(f), dec, 6, SIGMA, seed, Estimator("rge", BUDGET)),
    "zo-ae-ds-cge": lambda f, dec, seed: ZerothOrderAEDS(hide(f), dec, 6, SIGMA, seed, Estimator("cge", BUDGET)),
    "deepzero": lambda f, _, seed: DeepZeroDS(hide(f), SIGMA, seed),
    "split": lambda f, _, seed: DeepZeroSplit(hide(f), (1, 9, 8), SIGMA, seed, BUDGET),
    "fo-ds": lambda f, _, seed: FirstOrderDS(f, SIGMA, seed),
    "pretraining": lambda f, _, seed: Pretraining(SIGMA, seed),
}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("fo-ds", "pretraining")])
def test_budgets_are_equal_to_the_query_and_to_the_example(name: str, wider: tuple[nn.Module, Batch]) -> None:
    (smooth, batch), (encoding, decoder) = wider, autoencoding()
    source = METHODS[name](smooth, decoder, SEED)
    module = encoding if name.startswith("zo-ae-ds") else encoding.get_submodule("denoiser")
    masks = None
    if name == "deepzero":
        box, generator = hide(smooth), torch.Generator().manual_seed(0)
        scores = denoiser_scores(
            module, box, batch.inputs, batch.targets, sigma=SIGMA, seed=SEED, queries=5, generator=generator
        )
        assert box.queries == 2 * 6 * len(batch.inputs)
        masks = draw_masks(budget_ratios(scores, module, BUDGET), module, generator)
        source.estimate(module, batch, masks)  # preparing an evaluator asks a few questions of its own, once
    before = source.classifier.queries
    estimate = source.estimate(module, batch, masks)
    assert estimate.queries == source.cost(module, masks) == BUDGET
    assert source.classifier.queries - before == BUDGET * len(batch.inputs)


@pytest.mark.parametrize("name", METHODS)
def test_estimates_are_a_function_of_seed_and_step_and_touch_nothing(name: str, wider: tuple[nn.Module, Batch]) -> None:
    (smooth, batch), (encoding, decoder) = wider, autoencoding()

    def build(seed: int) -> Any:
        return METHODS[name](smooth, decoder, seed)

    module = encoding if name.startswith("zo-ae-ds") else encoding.get_submodule("denoiser")
    before = [copy.deepcopy(part.state_dict()) for part in (module, smooth, decoder)]
    state = torch.get_rng_state()
    chosen = {"last.weight": torch.arange(9)} if name == "deepzero" else None
    first, again, seeded = (build(seed).estimate(module, batch, chosen) for seed in (1, 1, 2))
    later = build(1).estimate(module, Batch.of(6, 1, 3, batch.inputs, batch.targets), chosen)
    assert all(torch.equal(first.gradients[key], again.gradients[key]) for key in first.gradients)
    assert first.loss == again.loss
    assert len({first.loss, seeded.loss, later.loss}) == 3
    assert torch.equal(torch.get_rng_state(), state)
    for old, part in zip(before, (module, smooth, decoder), strict=True):
        assert all(torch.equal(value, part.state_dict()[key]) for key, value in old.items())
        assert all(value.grad is None for value in part.parameters())


def test_classifiers_and_decoders_in_training_mode_are_refused(smooth: nn.Module) -> None:
    training = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    with pytest.raises(RequestError, match="in training mode"):
        FirstOrderDS(training, SIGMA, SEED)
    with pytest.raises(RequestError, match="in training mode"):
        ZerothOrderAEDS(hide(smooth), training, 6, SIGMA, SEED)
    with pytest.raises(RequestError, match="at least 2, not 1"):
        DeepZeroSplit(hide(smooth), SHAPE, SIGMA, SEED, queries=1)


def test_float32_rounding_is_small_beside_the_answers_at_the_default_steps(
    victim: nn.Module, clean: Any, pretrained: Callable[[str], nn.Module]
) -> None:
    """Every default μ in float32, against backpropagation through a rectifier network with all its kinks."""
    module, box = pretrained("dncnn"), hide(victim)
    batch = Batch.of(0, 0, 0, *clean.batch(0, 0))
    true = FirstOrderDS(victim, SIGMA, SEED).estimate(module, batch, None).gradients
    split = DeepZeroSplit(box, (1, 8, 8), SIGMA, SEED).estimate(module, batch, None)
    pixels = ZerothOrderDS(box, (1, 8, 8), SIGMA, SEED, Estimator("cge")).estimate(module, batch, None)
    zeroth = DeepZeroDS(box, SIGMA, SEED).estimate(module, batch, None)
    assert relative_error(split.gradients, true) < 0.03
    assert relative_error(pixels.gradients, true) < 0.05
    assert relative_error(zeroth.gradients, true) < 0.05
