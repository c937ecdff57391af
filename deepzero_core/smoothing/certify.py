"""Randomised smoothing after Cohen, Rosenfeld and Kolter 2019, algorithm CERTIFY and PREDICT.

The smoothed classifier answers with the class that the classifier f gives most often to x + ε, ε ~ N(0, σ²I).
If that class has probability at least p > ½, the answer is the same everywhere within σ·Φ⁻¹(p) of x (L2 norm, units
of x).

classifier: callable, [N, …] → scores [N, K], K ≥ 2; its answer is the argmax. x: one example, without the batch axis.
batch_size: most noisy copies given to the classifier at once.

Every noisy copy is a draw of its own from the generator, so that the same generator state gives the same copies in
the same order whatever the batch size (one large draw would not: torch fills long tensors in a different order from
short ones).
The result is then the same too, as far as the classifier treats its examples one by one: BatchNorm in training mode
does not, and is refused where it can be seen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import ndtri
from scipy.stats import binomtest
from torch import Tensor, nn

from deepzero_core.errors import RequestError, WorkError

ABSTAIN = -1

Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Certificate:
    """What `certify` can promise about one example.

    label: the smoothed classifier's answer, −1 = abstain. radius: L2, units of x; 0.0 where it abstains.
    samples: noisy copies classified, selection and estimation together (n0 + n).
    p_lower: lower confidence bound on the probability of the class that looked most likely, also where it abstains.
    """

    label: int
    radius: float
    samples: int
    p_lower: float

    @property
    def abstained(self) -> bool:
        return self.label == ABSTAIN


def certify(
    classifier: Classifier,
    x: Tensor,
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    batch_size: int,
    generator: torch.Generator,
) -> Certificate:
    """A radius within which the smoothed classifier's answer is constant, true with probability at least 1 − alpha.

    n0 copies choose the class c, n fresh ones bound its probability from below (Clopper–Pearson, one-sided, level 1 −
    alpha):
    p = p_lower; radius σ·Φ⁻¹(p) where p > ½, else abstention. The largest radius n copies can show is
    σ·Φ⁻¹(alpha^(1/n)).

    RequestError: sigma, alpha, n0, n or batch_size out of range, x not of a floating type, classifier in training
    mode with BatchNorm, or not answering [N, K]. WorkError: scores that are not numbers.
    """
    _check(classifier, x, sigma=sigma, alpha=alpha, n0=n0, n=n, batch_size=batch_size)
    chosen = int(_class_counts(classifier, x, sigma, n0, batch_size, generator).argmax())
    hits = int(_class_counts(classifier, x, sigma, n, batch_size, generator)[chosen])
    test = binomtest(hits, n, alternative="greater")
    p_lower = float(test.proportion_ci(confidence_level=1 - alpha, method="exact").low)
    if p_lower <= 0.5:
        return Certificate(ABSTAIN, 0.0, n0 + n, p_lower)
    return Certificate(chosen, sigma * float(ndtri(p_lower)), n0 + n, p_lower)


def predict(
    classifier: Classifier,
    x: Tensor,
    *,
    sigma: float,
    n: int,
    alpha: float,
    batch_size: int,
    generator: torch.Generator,
) -> int:
    """The smoothed classifier's answer, wrong with probability at most alpha, or −1 (abstain).

    The two classes seen most often, n_A ≥ n_B times among n copies, are told apart by the two-sided binomial test of
    n_A successes among n_A + n_B at probability ½; it abstains where the p-value exceeds alpha. Errors as `certify`.
    """
    _check(classifier, x, sigma=sigma, alpha=alpha, n=n, batch_size=batch_size)
    counts = _class_counts(classifier, x, sigma, n, batch_size, generator)
    (first, second), (label, _) = (part.tolist() for part in counts.topk(2))
    return int(label) if binomtest(first, first + second, 0.5).pvalue <= alpha else ABSTAIN


def _class_counts(
    classifier: Classifier, x: Tensor, sigma: float, samples: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """How many of `samples` noisy copies of x the classifier gives to each class: int64 [K]."""
    counts: Tensor | None = None
    for start in range(0, samples, batch_size):
        size = min(batch_size, samples - start)
        noise = torch.empty(size, *x.shape, dtype=x.dtype, device=generator.device)
        for one in noise:
            one.normal_(generator=generator)
        with torch.no_grad():
            scores = classifier(x + sigma * noise.to(x.device))
        classes = None if counts is None else len(counts)
        seen = torch.bincount(_answers(scores, size, classes), minlength=scores.shape[1])
        counts = seen if counts is None else counts + seen
    assert counts is not None  # samples ≥ 1 has been checked
    return counts


def _answers(scores: Tensor, size: int, classes: int | None) -> Tensor:
    fits = scores.ndim == 2 and len(scores) == size and scores.shape[1] >= 2
    if not fits or classes not in (None, scores.shape[1]):
        raise RequestError(
            f"the classifier must answer {size} examples with scores of shape [{size}, {classes or 'K ≥ 2'}], "
            f"but answered with {list(scores.shape)}"
        )
    if bool(torch.isnan(scores).any()):
        raise WorkError("the classifier answered with scores that are not numbers (NaN)")
    return scores.argmax(dim=1).cpu()


def _check(classifier: Classifier, x: Tensor, *, sigma: float, alpha: float, **counts: int) -> None:
    if not (sigma > 0 and math.isfinite(sigma)):
        raise RequestError(f"sigma, the standard deviation of the noise, must be positive and finite, but is {sigma}")
    if not 0 < alpha < 1:
        raise RequestError(f"alpha, the probability of a wrong answer, must lie between 0 and 1, but is {alpha}")
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise RequestError(f"{name} must be a whole number of at least 1, but is {value!r}")
    if not x.is_floating_point():
        raise RequestError(f"x must have a floating type for noise to be added to it, but is of {x.dtype}")
    if isinstance(classifier, nn.Module) and any(
        layer.training for layer in classifier.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ):
        raise RequestError(
            "the classifier has BatchNorm in training mode, where one example's answer depends on the others; "
            "call .eval() on it first"
        )
