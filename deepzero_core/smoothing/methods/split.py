"""DeepZero-split: finite differences only where nobody can differentiate, and as few as possible; the chain rule else.

Like ZO-DS it works at z = D(x + δ), and it spends the same queries better in two ways.

1. Directions are the cosines of the image of lowest frequency, orthonormal, in order, instead of random ones:
   [l(z + μc) − l(z)]/μ is then a coefficient of the gradient itself, without sampling noise, and what is left out are
   fine checks, which a classifier heeds and a convolutional denoiser moves least.
2. Each example has the number of directions that its loss is worth. The gradient of example i is bounded by
   ‖softmax f(z_i) − y_i‖ times the classifier's own slope, and the first factor is known after the base query. The
   queries' examples are shared out in proportion to its square, at most as many to each as it has pixels.

Relative error of the denoiser's gradient (cosine with the exact one), differences without rounding, a trained cnn:

    8×8 digits, queries                        5            9           17           33
    cosines, the same for all examples   .84 (.510)   .76 (.641)   .69 (.715)   .50 (.865)
    shared out by ‖softmax − y‖          .53 (.847)   .22 (.973)   .05 (.998)   .01 (1.00)
    shared out by its square             .42 (.903)   .16 (.985)   .04 (.999)   .01 (1.00)
    random directions, orthonormal             –            –     1.67 (.536)   .92 (.669)
    random directions, normal (ZO-DS)          –            –     2.12 (.314)  1.46 (.407)

With more queries than C·H·W + 1 coefficients are asked for again, in rounds over all of them of which the last is
shared out as above: from the other side and then at smaller steps (`deepzero_core.estimators.stencil`). With
2·C·H·W + 1 or more every coefficient is a central difference at least, and the estimate the exact gradient up to O(μ²).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core.errors import RequestError
from deepzero_core.estimators.stencil import Stencil
from deepzero_core.perturb.black_box import BlackBox
from deepzero_core.perturb.estimate import GradientEstimate, check_arguments
from deepzero_core.smoothing.losses import squared_distance, stability
from deepzero_core.smoothing.methods.boundary import QUERIES
from deepzero_core.smoothing.methods.chain import AtBoundary, chain_rule
from deepzero_core.smoothing.methods.cosines import Cosines
from deepzero_core.smoothing.noise import noisy
from deepzero_core.training.sources import Batch, Coordinates

_MEMORY = 32 << 20


@dataclass(frozen=True)
class DeepZeroSplit:
    """Coefficients of the loss's gradient at the denoised image, lowest frequencies of the hardest examples first.

    classifier: the black box, images [N, C, H, W] in [0, 1] → logits [N, K].
    image_shape: (C, H, W). sigma: standard deviation of the noise, in units of the images.
    queries: of a step, the base one included.
    mu: length of the step in units of the images, ‖·‖₂; for answers in float32 (see `boundary`).
    reconstruction: weight w of ‖z − x‖², whose gradient 2w(z − x) needs no query.
    Batches hold clean images and the labels that the classifier gives them; the module is the denoiser. A query stands
    for B examples asked of the classifier, whichever of the batch they are: a step asks `cost` × B of them.

    RequestError: fewer than two queries, μ not positive.
    """

    classifier: BlackBox
    image_shape: tuple[int, int, int]
    sigma: float
    seed: int
    queries: int = QUERIES
    mu: float = 3e-4
    reconstruction: float = 0.0

    def __post_init__(self) -> None:
        check_arguments(self.mu, "forward")
        if self.queries < 2:
            raise RequestError(f"queries of a step must be at least 2, not {self.queries}")

    @property
    def _size(self) -> int:
        return math.prod(self.image_shape)

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return self.queries

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        def boundary(z: Tensor) -> AtBoundary:
            logits = self.classifier(z)
            base = stability(logits.double(), batch.targets)
            gradient = self._gradient(z, logits, base, batch.targets)
            distance = self.reconstruction * squared_distance(z, batch.inputs)
            return AtBoundary(base + distance, logits, gradient + 2 * self.reconstruction * (z - batch.inputs))

        inputs = noisy(batch.inputs, self.sigma, self.seed, batch.number)
        return chain_rule(module, inputs, boundary, queries=self.cost(module, coordinates))

    def _gradient(self, z: Tensor, logits: Tensor, base: Tensor, labels: Tensor) -> Tensor:
        batch, size, cosines = len(z), self._size, Cosines(self.image_shape, z)
        full, left = divmod(self.queries - 1, size)
        last = share_out(hardness(logits, labels), left * batch, size).to(z.device)
        rounds = [torch.full_like(last, size)] * full + ([last] if left else [])
        stencil = Stencil(len(rounds))
        weights = torch.stack([stencil.weights(count) for count in range(stencil.most + 1)]).to(z.device)
        coefficients = torch.zeros(batch, size, dtype=torch.float64, device=z.device)
        at_once = max(1, _MEMORY // (3 * size * z.element_size()))
        for number, counts in enumerate(rounds):
            owners = torch.arange(batch, device=z.device).repeat_interleave(counts)
            ranks = torch.arange(len(owners), device=z.device) - (counts.cumsum(0) - counts)[owners]
            for some, which in zip(owners.split(at_once), ranks.split(at_once), strict=True):
                moved = z[some] + stencil.step(number) * self.mu * cosines.images(which)
                slopes = (stability(self.classifier(moved).double(), labels[some]) - base[some]) / self.mu
                evaluations = full + (which < last[some]).long()
                coefficients.index_put_((some, which), slopes * weights[evaluations, number], accumulate=True)
        return cosines.sum(coefficients.to(z.dtype))


def hardness(logits: Tensor, labels: Tensor) -> Tensor:
    """‖softmax(f) − y‖², the squared gradient of the cross-entropy at the logits [B, K]: [B] in float64."""
    wanted = F.one_hot(labels, logits.shape[1])
    return (logits.double().softmax(1) - wanted).square().sum(1)


def share_out(weights: Tensor, total: int, most: int) -> Tensor:
    """Whole numbers [B] in proportion to weights [B], at most `most` each, that sum to min(total, B·most).

    The heaviest come first; what one cannot take is left to those after it, and those of no weight share it evenly.
    """
    counts = torch.zeros(len(weights), dtype=torch.long)
    order = weights.argsort(descending=True, stable=True)
    heaviest_first = weights[order].tolist()
    left = min(total, len(order) * most)
    for place, index in enumerate(order.tolist()):
        rest, places = math.fsum(heaviest_first[place:]), len(order) - place
        share = round(left * heaviest_first[place] / rest) if rest > 0 else -(-left // places)
        counts[index] = taken = min(most, left, max(share, left - (places - 1) * most))
        left -= taken
    return counts
