"""ZO-AE-DS: an autoencoder behind the denoiser, and the zeroth-order gradient at its latent.

The trained network is `denoiser_and_encoder`; decoder and classifier together are the black box, so that finite
differences work on the few numbers of the latent: ∇ ≈ ∇_θ[aᵀ enc(D(x + δ))], a the estimate at the latent.
Source: Zhang et al. 2022 (How to robustify black-box ML models? A zeroth-order optimization perspective).
"""

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deepzero_core.models import Autoencoder
from deepzero_core.perturb.black_box import BlackBox
from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.smoothing.classifiers import require_evaluation
from deepzero_core.smoothing.losses import squared_distance, stability
from deepzero_core.smoothing.methods.boundary import Estimator
from deepzero_core.smoothing.methods.chain import AtBoundary, chain_rule
from deepzero_core.smoothing.noise import direction_generator, noisy
from deepzero_core.training.sources import Batch, Coordinates


def denoiser_and_encoder(denoiser: nn.Module, autoencoder: Autoencoder) -> nn.Sequential:
    """What ZO-AE-DS trains, [B, C, H, W] → [B, latent], sharing both modules' parameters."""
    parts: list[tuple[str, nn.Module]] = [("denoiser", denoiser), ("encoder", autoencoder.encoder)]
    return nn.Sequential(OrderedDict(parts))


@dataclass(frozen=True)
class ZerothOrderAEDS:
    """RGE or CGE of every example's loss at the latent of an autoencoder.

    classifier: the black box, images [N, C, H, W] in [0, 1] → logits [N, K].
    decoder: [N, latent] → [N, C, H, W], in evaluation mode; never trained and never differentiated.
    latent: numbers per image. sigma: standard deviation of the noise, in units of the images.
    estimator: with μ in units of the latent, 3e-4 unless said otherwise: for latents of the size of one and answers in
    float32 (see `boundary`).
    reconstruction: weight w of ‖dec(z) − x‖², part of the black box's loss.
    Batches hold clean images and the labels that the classifier gives them; the module is `denoiser_and_encoder`. A
    query is one evaluation of the loss on the whole batch: a step asks the classifier `cost` × B examples.

    RequestError: a decoder in training mode.
    """

    classifier: BlackBox
    decoder: nn.Module
    latent: int
    sigma: float
    seed: int
    estimator: Estimator = field(default_factory=Estimator)
    reconstruction: float = 0.0

    def __post_init__(self) -> None:
        require_evaluation(self.decoder)

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return self.estimator.cost

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        def answer(latents: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
            images = self.decoder(latents)
            logits = self.classifier(images)
            losses = stability(logits.double(), batch.targets[owners])
            if self.reconstruction:
                distance = squared_distance(images.double(), batch.inputs.double()[owners])
                losses = losses + self.reconstruction * distance
            return losses, logits

        def boundary(z: Tensor) -> AtBoundary:
            base, logits = answer(z, torch.arange(len(z), device=z.device))
            generator = direction_generator(self.seed, batch.number)
            pixels = batch.inputs[0].numel()
            gradient = self.estimator.gradient(lambda *at: answer(*at)[0], z, base, generator, widest=pixels)
            return AtBoundary(base, logits, gradient)

        inputs = noisy(batch.inputs, self.sigma, self.seed, batch.number)
        return chain_rule(module, inputs, boundary, queries=self.cost(module, coordinates))
