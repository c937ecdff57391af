"""What a set of certificates says about a classifier.

Abstention counts as wrong, at radius 0 too (Cohen et al. 2019). All of them raise RequestError where there are no
certificates, another number of labels, or a label that is no class.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deepzero_core.errors import RequestError
from deepzero_core.smoothing.courses import Certificate


@dataclass(frozen=True)
class AccuracyCurve:
    """Certified accuracy over radius: a step function that falls.

    radii: rising, from 0; [m]. accuracy: [m]; accuracy[i] holds for radii[i − 1] < r ≤ radii[i] and it is 0 beyond the
    last.
    """

    radii: tuple[float, ...]
    accuracy: tuple[float, ...]

    def at(self, radius: float) -> float:
        """Certified accuracy at any radius ≥ 0."""
        return next((share for r, share in zip(self.radii, self.accuracy, strict=True) if r >= radius), 0.0)


def accuracy_curve(certificates: Sequence[Certificate], labels: Iterable[int]) -> AccuracyCurve:
    """The whole curve, with a point at every radius at which it falls."""
    right = _right_radii(certificates, labels)
    radii = sorted({0.0, *(radius for radius in right if radius is not None)})
    return AccuracyCurve(tuple(radii), tuple(_share(right, radius) for radius in radii))


def certified_accuracy(
    certificates: Sequence[Certificate], labels: Iterable[int], radii: Iterable[float]
) -> dict[float, float]:
    """By radius r, in the order given: the share of examples answered rightly with a certified radius of at least r.

    RequestError also: a radius that is negative or not a number.
    """
    right = _right_radii(certificates, labels)
    asked = [float(radius) for radius in radii]
    for radius in asked:
        if not radius >= 0:
            raise RequestError(f"a radius must be at least 0, but is {radius}")
    return {radius: _share(right, radius) for radius in asked}


def average_certified_radius(certificates: Sequence[Certificate], labels: Iterable[int]) -> float:
    """Mean certified radius, 0 for each example not answered rightly (ACR, Zhai et al. 2020)."""
    right = _right_radii(certificates, labels)
    return math.fsum(radius or 0.0 for radius in right) / len(right)


def _share(right: Sequence[float | None], at_least: float) -> float:
    return sum(radius is not None and radius >= at_least for radius in right) / len(right)


def _right_radii(certificates: Sequence[Certificate], labels: Iterable[int]) -> list[float | None]:
    """The radius of each example, None where the answer is wrong or there is none."""
    truths = [int(label) for label in labels]
    if not certificates or len(certificates) != len(truths):
        raise RequestError(
            f"there must be one label per certificate, and at least one, but there are {len(certificates)} "
            f"certificates and {len(truths)} labels"
        )
    for number, truth in enumerate(truths):
        if truth < 0:
            raise RequestError(f"labels are classes, numbered from 0, but label {number} is {truth}")
    return [
        certificate.radius if certificate.label == truth and not certificate.abstained else None
        for certificate, truth in zip(certificates, truths, strict=True)
    ]
