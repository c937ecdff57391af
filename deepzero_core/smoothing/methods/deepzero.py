"""DeepZero: sparse coordinate-wise estimation of the denoiser's own parameters, the classifier a black-box tail.

Nothing is differentiated. The engine carries exact differences through the denoiser to the classifier's input; the
classifier answers all perturbations of a chunk in one question, and the loss behind it is differences again.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from deepzero_core.errors import RequestError
from deepzero_core.estimators.cge import DEFAULT_MEMORY
from deepzero_core.perturb.black_box import BlackBox, behind
from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.smoothing.losses import squared_distance, stability
from deepzero_core.smoothing.noise import noisy
from deepzero_core.sparsity import zo_grasp_scores
from deepzero_core.training.sources import Batch, CGESource, Coordinates

_PREFIX = "denoiser."


def denoiser_scores(
    denoiser: nn.Module,
    classifier: BlackBox,
    images: Tensor,
    labels: Tensor,
    *,
    sigma: float,
    seed: int,
    queries: int = 192,
    mu: float = 5e-3,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """ZO-GraSP scores of the denoiser for the stability loss, at clean images and the classifier's labels of them.

    For `deepzero_core.sparsity.budget_ratios`. Arguments otherwise as in `zo_grasp_scores`, which asks 2·(queries + 1)
    queries in all. A last convolution that is zero has scores of zero: pre-train first.
    """
    inputs = noisy(images, sigma, seed, 0)
    loss_fn = behind(classifier, stability)
    return zo_grasp_scores(denoiser, inputs, labels, loss_fn, queries=queries, mu=mu, generator=generator)


@dataclass
class DeepZeroDS:
    """CGE of the coordinates that a step's masks leave, BatchNorm with each query's own batch statistics.

    classifier: the black box, images [N, C, H, W] in [0, 1] → logits [N, K].
    sigma: standard deviation of the noise, in units of the images. reconstruction: weight w of ‖D(x + δ) − x‖².
    mu: of the parameters. The answers are float32 and cancel, so that it cannot be as small as where the engine carries
    differences to the loss; for the measurement see `boundary`.
    Batches hold clean images and the labels that the classifier gives them; the module is the denoiser, and
    `budget_ratios` gives the ratios that make a step cost a budget exactly. A query is one evaluation of the loss on
    the whole batch: a step asks the classifier `cost` × B examples.
    """

    classifier: BlackBox
    sigma: float
    seed: int
    mu: float = 1e-4
    difference: str = "forward"
    reconstruction: float = 0.0
    memory: int = DEFAULT_MEMORY
    _cge: CGESource = field(init=False, repr=False)

    def __post_init__(self) -> None:
        loss_fn = _Stability(self.reconstruction)
        self._cge = CGESource(loss_fn, self.mu, self.difference, self.memory)

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return self._cge.cost(module, coordinates)

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        inputs = noisy(batch.inputs, self.sigma, self.seed, batch.number)
        if self.reconstruction:
            inputs = torch.cat([inputs, batch.inputs], 1)
        defended = _Defended(module, self.classifier, bool(self.reconstruction))
        chosen = None if coordinates is None else {_PREFIX + name: value for name, value in coordinates.items()}
        seen = Batch.of(batch.number, batch.epoch, batch.index, inputs, batch.targets)
        estimate = self._cge.estimate(defended, seen, chosen)
        return replace(
            estimate,
            gradients=_without_prefix(estimate.gradients),
            buffers=_without_prefix(estimate.buffers),
            outputs=estimate.outputs[0] if self.reconstruction else estimate.outputs,
        )


class _Defended(nn.Module):
    """f(D(x + δ)), with ‖D(x + δ) − x‖² beside it where x comes in as further channels behind x + δ."""

    def __init__(self, denoiser: nn.Module, classifier: BlackBox, reconstructs: bool) -> None:
        super().__init__()
        self.denoiser, self.classifier, self.reconstructs = denoiser, classifier, reconstructs
        if any(True for _ in classifier.parameters()):
            raise RequestError("the classifier must be a black box without parameters")

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.reconstructs:
            answer: Tensor = self.classifier(self.denoiser(inputs))
            return answer
        with_noise, clean = inputs.chunk(2, 1)
        denoised = self.denoiser(with_noise)
        return self.classifier(denoised), squared_distance(denoised, clean)


@dataclass(frozen=True)
class _Stability:
    """Of logits, or of logits and squared distances; equal where its weight is, so that an evaluator stays right."""

    reconstruction: float

    def __call__(self, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return stability(outputs, labels)
        logits, distances = outputs
        return stability(logits, labels) + self.reconstruction * distances


def _without_prefix(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_PREFIX): value for name, value in values.items()}
