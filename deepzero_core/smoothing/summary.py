"""What a set of certificates says about a classifier."""

from collections.abc import Iterable, Sequence

from deepzero_core.errors import RequestError
from deepzero_core.smoothing.certify import Certificate


def certified_accuracy(
    certificates: Sequence[Certificate], labels: Iterable[int], radii: Iterable[float]
) -> dict[float, float]:
    """By radius r, in the order given: the share of examples answered rightly with a certified radius of at least r.

    Abstention counts as wrong, at radius 0 too (Cohen et al. 2019). RequestError: no certificates, or another number
    of labels.
    """
    right = _right_radii(certificates, labels)
    return {float(r): sum(radius is not None and radius >= r for radius in right) / len(right) for r in radii}


def average_certified_radius(certificates: Sequence[Certificate], labels: Iterable[int]) -> float:
    """Mean certified radius, 0 for each example not answered rightly (ACR, Zhai et al. 2020).

    Errors as `certified_accuracy`.
    """
    right = _right_radii(certificates, labels)
    return sum(radius or 0.0 for radius in right) / len(right)


def _right_radii(certificates: Sequence[Certificate], labels: Iterable[int]) -> list[float | None]:
    """The radius of each example, None where the answer is wrong or there is none."""
    truths = [int(label) for label in labels]
    if not certificates or len(certificates) != len(truths):
        raise RequestError(
            f"there must be one label per certificate, and at least one, but there are {len(certificates)} "
            f"certificates and {len(truths)} labels"
        )
    return [
        certificate.radius if certificate.label == truth and not certificate.abstained else None
        for certificate, truth in zip(certificates, truths, strict=True)
    ]
