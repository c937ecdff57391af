"""ZO-DS: a zeroth-order gradient at the classifier's input, and backpropagation of it into the denoiser."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from deepzero_core.perturb.black_box import BlackBox
from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.smoothing.losses import squared_distance, stability
from deepzero_core.smoothing.methods.boundary import Estimator
from deepzero_core.smoothing.methods.chain import AtBoundary, chain_rule
from deepzero_core.smoothing.noise import direction_generator, noisy
from deepzero_core.training.sources import Batch, Coordinates


@dataclass(frozen=True)
class ZerothOrderDS:
    """RGE or CGE of every example's loss at the denoised image z = D(x + δ). Source: Zhang et al. 2022.

    classifier: the black box, images [N, C, H, W] in [0, 1] → logits [N, K].
    image_shape: (C, H, W). sigma: standard deviation of the noise, in units of the images.
    estimator: with μ in units of the images, 3e-4 unless said otherwise, for answers in float32 (see `boundary`).
    reconstruction: weight w of ‖z − x‖², whose gradient 2w(z − x) needs no query.
    Batches hold clean images and the labels that the classifier gives them; the module is the denoiser. A query is one
    evaluation of the loss on the whole batch: a step asks the classifier `cost` × B examples.
    """

    classifier: BlackBox
    image_shape: tuple[int, int, int]
    sigma: float
    seed: int
    estimator: Estimator = field(default_factory=Estimator)
    reconstruction: float = 0.0

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return self.estimator.cost

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        def losses(images: Tensor, owners: Tensor) -> Tensor:
            return stability(self.classifier(images).double(), batch.targets[owners])

        def boundary(z: Tensor) -> AtBoundary:
            logits = self.classifier(z)
            base = stability(logits.double(), batch.targets)
            generator = direction_generator(self.seed, batch.number)
            gradient = self.estimator.gradient(losses, z, base, generator)
            distance = self.reconstruction * squared_distance(z, batch.inputs)
            return AtBoundary(base + distance, logits, gradient + 2 * self.reconstruction * (z - batch.inputs))

        inputs = noisy(batch.inputs, self.sigma, self.seed, batch.number)
        return chain_rule(module, inputs, boundary, queries=self.cost(module, coordinates))
