"""Pre-training of a denoiser or an autoencoder on noisy images: needs no classifier and no query."""

from dataclasses import dataclass

from torch import nn

from deepzero_core.estimators import first_order
from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.smoothing.losses import mean_squared_error
from deepzero_core.smoothing.noise import noisy
from deepzero_core.training.sources import Batch, Coordinates


@dataclass(frozen=True)
class Pretraining:
    """Backpropagation of the mean over pixels of (D(x + δ) − x)²; sigma 0 trains an autoencoder on clean images."""

    sigma: float
    seed: int

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return 1

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        inputs = noisy(batch.inputs, self.sigma, self.seed, batch.number)
        return first_order(module, inputs, batch.inputs, mean_squared_error)
