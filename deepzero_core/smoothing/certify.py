"""Randomised smoothing after Cohen, Rosenfeld and Kolter 2019, algorithms CERTIFY and PREDICT.

The smoothed classifier answers with the class that the classifier f gives most often to x + ε, ε ~ N(0, σ²I).
If that class has probability at least p > ½, the answer is the same everywhere within σ·Φ⁻¹(p) of x (L2 norm, units
of x).

classifier: callable, [N, …] → scores [N, K], K ≥ 2; its answer is the argmax. x: one example, without the batch axis.
batch_size: most noisy copies given to the classifier at once.

The same generator state gives the same copies in the same order whatever the batch size and whoever shares the batch,
and the generator is left in the same state. The result is then the same too, as far as the classifier treats its
examples one by one: BatchNorm in training mode does not, and is refused where it can be seen.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from deepzero_core.errors import RequestError
from deepzero_core.smoothing.adaptive import adaptive as adaptive_course
from deepzero_core.smoothing.copies import NoisyCopies
from deepzero_core.smoothing.courses import Certificate, Course, fixed, prediction
from deepzero_core.smoothing.sampling import Classifier, run
from deepzero_core.smoothing.settings import Certification, check


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
    adaptive: bool = False,
    radii: tuple[float, ...] = (),
) -> Certificate:
    """A radius within which the smoothed classifier's answer is constant, true with probability at least 1 − alpha.

    n0 copies choose the class c, n fresh ones bound its probability from below (Clopper–Pearson, one-sided, level 1 −
    alpha):
    p = p_lower; radius σ·Φ⁻¹(p) where p > ½, else abstention. The largest radius n copies can show is
    σ·Φ⁻¹(alpha^(1/n)). `adaptive` stops as soon as it is decided whether x is certified at every one of `radii`, with
    the same guarantee (see `deepzero_core.smoothing.adaptive`).

    RequestError: sigma, alpha, n0, n, batch_size or radii out of range, x not finite or not of a floating type,
    classifier in training mode with BatchNorm, or one that cannot take x or does not answer [N, K]. WorkError: scores
    that are not numbers.
    """
    settings = Certification(sigma, n0, n, alpha, batch_size, adaptive, tuple(radii))
    (certificate,) = certify_many(classifier, [x], settings, generators=[generator])
    return certificate


def certify_many(
    classifier: Classifier,
    images: Iterable[Tensor],
    settings: Certification,
    *,
    generators: Iterable[torch.Generator],
) -> Iterator[Certificate]:
    """The certificate of every image, in order, as `certify` gives it one by one, their copies sharing batches.

    images: [M, …], or any iterable of examples of one shape, read as there is room for them. generators: one per image.
    Errors as `certify`, and RequestError where an image is unlike the first, or has no generator.
    """
    return run(classifier, _begun(images, settings, generators), settings.batch_size)


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
    check(sigma=sigma, alpha=alpha, n=n, batch_size=batch_size)
    _check_example(x)
    (label,) = run(classifier, [(NoisyCopies(x, sigma, generator), prediction(n, alpha))], batch_size)
    return label


def _begun(
    images: Iterable[Tensor], settings: Certification, generators: Iterable[torch.Generator]
) -> Iterator[tuple[NoisyCopies, Course[Certificate]]]:
    first: Tensor | None = None
    given = iter(generators)
    for number, x in enumerate(images):
        _check_example(x)
        first = x if first is None else first
        if (x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device):
            raise RequestError(
                f"the images must be alike, but image {number} is {list(x.shape)} of {x.dtype} on {x.device} and the "
                f"first is {list(first.shape)} of {first.dtype} on {first.device}"
            )
        generator = next(given, None)
        if generator is None:
            raise RequestError(f"every image needs a generator of its own, but there is none for image {number}")
        course = adaptive_course(settings) if settings.adaptive else fixed(settings)
        yield NoisyCopies(x, settings.sigma, generator), course


def _check_example(x: Tensor) -> None:
    if not x.is_floating_point():
        raise RequestError(f"x must have a floating type for noise to be added to it, but is of {x.dtype}")
    if not x.numel():
        raise RequestError(f"x must have values, but has the shape {list(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise RequestError("x holds values that are not finite")
