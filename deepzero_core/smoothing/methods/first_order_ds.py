"""FO-DS: the denoiser is trained through a classifier that is a white box. The upper bound of every other method."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.smoothing.classifiers import require_evaluation
from deepzero_core.smoothing.losses import squared_distance, stability
from deepzero_core.smoothing.methods.chain import AtBoundary, chain_rule
from deepzero_core.smoothing.noise import noisy
from deepzero_core.training.sources import Batch, Coordinates


@dataclass(frozen=True)
class FirstOrderDS:
    """Backpropagation through the classifier, which stays as it is. One query.

    classifier: images [N, C, H, W] in [0, 1] → logits [N, K], in evaluation mode.
    sigma: standard deviation of the noise, in units of the images. reconstruction: weight w of ‖D(x + δ) − x‖².
    Batches hold clean images and the labels that the classifier gives them; the module is the denoiser.
    """

    classifier: nn.Module
    sigma: float
    seed: int
    reconstruction: float = 0.0

    def __post_init__(self) -> None:
        require_evaluation(self.classifier)

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return 1

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        def boundary(z: Tensor) -> AtBoundary:
            with torch.enable_grad():
                z = z.requires_grad_()
                logits = self.classifier(z)
                losses = stability(logits, batch.targets)
                if self.reconstruction:
                    losses = losses + self.reconstruction * squared_distance(z, batch.inputs)
                (gradient,) = torch.autograd.grad(losses.sum(), z)
            return AtBoundary(losses.detach(), logits.detach(), gradient)

        return chain_rule(module, noisy(batch.inputs, self.sigma, self.seed, batch.number), boundary, queries=1)
