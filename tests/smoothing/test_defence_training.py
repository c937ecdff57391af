"""Training denoisers with every method: it lowers the stability loss, keeps to its budget, and resumes to the bit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scoring import hide
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core.data import BatchSource
from deepzero_core.models import Autoencoder
from deepzero_core.smoothing import noisy
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
from deepzero_core.sparsity import budget_ratios
from deepzero_core.training import Schedule, Trainer, TrainingSettings
from deepzero_core.training.checkpoint import load, save

SIGMA, SEED, BUDGET, SHAPE = 0.25, 0, 120, (1, 8, 8)
METHODS = ("fo-ds", "zo-ds", "zo-ae-ds", "deepzero", "deepzero-split")
Pretrained = Callable[[str], nn.Module]


class Run:
    """A method ready to train: its network, its source, its ratios, and what stands between network and classifier."""

    def __init__(self, method: str, victim: nn.Module, clean: BatchSource, pretrained: Pretrained) -> None:
        self.network, self.tail = pretrained("dncnn"), victim
        self.ratios: dict[str, float] | None = None
        box = hide(victim)
        if method == "fo-ds":
            self.source: Any = FirstOrderDS(victim, SIGMA, SEED)
        elif method == "zo-ds":
            self.source = ZerothOrderDS(box, SHAPE, SIGMA, SEED, Estimator("rge", BUDGET))
        elif method == "zo-ae-ds":
            autoencoder = pretrained("autoencoder")
            assert isinstance(autoencoder, Autoencoder)
            decoder = autoencoder.decoder.eval()
            self.network = denoiser_and_encoder(self.network, autoencoder)
            self.tail = nn.Sequential(decoder, victim).eval()
            self.source = ZerothOrderAEDS(box, decoder, autoencoder.latent, SIGMA, SEED, Estimator("rge", BUDGET))
        elif method == "deepzero":
            self.source = DeepZeroDS(box, SIGMA, SEED)
            images, labels = clean.batch(0, 0)
            scores = denoiser_scores(
                self.network,
                box,
                images,
                labels,
                sigma=SIGMA,
                seed=SEED,
                queries=30,
                generator=torch.Generator().manual_seed(0),
            )
            self.ratios = budget_ratios(scores, self.network, BUDGET)
        else:
            self.source = DeepZeroSplit(box, SHAPE, SIGMA, SEED, BUDGET)

    def trainer(self, clean: BatchSource, steps: int) -> Trainer:
        settings = TrainingSettings(
            steps=steps, schedule=Schedule(3e-3, steps), seed=SEED, optimizer="Adam", ratios=self.ratios
        )
        return Trainer(self.network, clean, self.source, settings)

    def stability(self, images: Tensor, labels: Tensor) -> float:
        """On noise that no step has seen."""
        with torch.no_grad():
            logits = self.tail(self.network.eval()(noisy(images, SIGMA, SEED + 1, 0)))
            return F.cross_entropy(logits, labels).item()


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_stability_loss(
    method: str, victim: nn.Module, clean: BatchSource, pretrained: Pretrained
) -> None:
    run = Run(method, victim, clean, pretrained)
    images, labels = next(iter(clean.ordered(1_000)))
    before = run.stability(images, labels)
    records = list(run.trainer(clean, 60).run())
    after = run.stability(images, labels)
    assert after < 0.9 * before
    cost = 1 if method == "fo-ds" else BUDGET
    assert [record.queries for record in records] == [cost * (step + 1) for step in range(60)]
    assert all(record.accuracy is not None and 0 <= record.accuracy <= 1 for record in records)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_it_ends_with_the_same_bits(
    method: str, victim: nn.Module, clean: BatchSource, pretrained: Pretrained, tmp_path: Any
) -> None:
    whole = Run(method, victim, clean, pretrained).trainer(clean, 4)
    records = []
    for record in whole.run():
        records.append(record)
        save(tmp_path / f"{record.step}.ckpt", whole.state())
    for step in (1, 3):
        torch.rand(step)
        resumed = Run(method, victim, clean, pretrained).trainer(clean, 4)
        resumed.restore(load(tmp_path / f"{step}.ckpt"))
        assert list(resumed.run()) == records[step:]
        for name, value in whole.module.state_dict().items():
            assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_a_query_budget_ends_the_run(victim: nn.Module, clean: BatchSource, pretrained: Pretrained) -> None:
    run = Run("zo-ds", victim, clean, pretrained)
    settings = TrainingSettings(
        steps=9, schedule=Schedule(1e-3, 9), seed=SEED, optimizer="Adam", query_budget=3 * BUDGET + 1
    )
    records = list(Trainer(run.network, clean, run.source, settings).run())
    assert [record.queries for record in records] == [BUDGET, 2 * BUDGET, 3 * BUDGET]


@pytest.mark.parametrize("name", ["dncnn", "unet", "autoencoder"])
def test_pretraining_is_of_images_and_not_of_classes(name: str, clean: BatchSource, pretrained: Pretrained) -> None:
    module = pretrained(name)
    assert all(value.grad is None for value in module.parameters())
    images, _ = next(iter(clean.ordered(500)))
    inputs = images if name == "autoencoder" else noisy(images, SIGMA, 5, 0)
    with torch.no_grad():
        error = (module.eval()(inputs) - images).square().mean().item()
    unmoved = images.var(0).mean().item() if name == "autoencoder" else SIGMA**2
    assert error < 0.5 * unmoved
    settings = TrainingSettings(steps=1, schedule=Schedule(1e-3, 1), seed=SEED)
    (record,) = Trainer(module, clean, Pretraining(SIGMA, SEED), settings).run()
    assert record.accuracy is None
    assert record.queries == 1
    assert math.isfinite(record.loss)
