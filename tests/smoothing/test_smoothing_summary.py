"""Certified accuracy and average certified radius."""

import pytest

from deepzero_core.errors import RequestError
from deepzero_core.smoothing import Certificate, accuracy_curve, average_certified_radius, certified_accuracy

CERTIFICATES = [
    Certificate(label=3, radius=0.5, samples=10, p_lower=0.9),
    Certificate(label=1, radius=0.25, samples=10, p_lower=0.8),
    Certificate(label=2, radius=0.7, samples=10, p_lower=0.99),
    Certificate(label=-1, radius=0.0, samples=10, p_lower=0.4),
]
LABELS = [3, 1, 0, 2]  # right, right, wrong, abstained


def test_certified_accuracy_counts_right_answers_with_at_least_that_radius() -> None:
    assert certified_accuracy(CERTIFICATES, LABELS, (0, 0.25, 0.5, 0.75)) == {0.0: 0.5, 0.25: 0.5, 0.5: 0.25, 0.75: 0.0}


def test_a_label_that_is_no_class_is_refused() -> None:
    with pytest.raises(RequestError, match="numbered from 0, but label 3 is -1"):
        certified_accuracy(CERTIFICATES, [3, 1, 0, -1], [0.0])


@pytest.mark.parametrize("radius", [-0.1, float("nan")])
def test_a_radius_below_zero_is_refused(radius: float) -> None:
    with pytest.raises(RequestError, match="radius must be at least 0"):
        certified_accuracy(CERTIFICATES, LABELS, [radius])


def test_the_curve_is_the_certified_accuracy_at_every_radius() -> None:
    curve = accuracy_curve(CERTIFICATES, LABELS)
    assert (curve.radii, curve.accuracy) == ((0.0, 0.25, 0.5), (0.5, 0.5, 0.25))
    for radius in (0.0, 0.1, 0.25, 0.250001, 0.5, 0.6, 9.0):
        assert curve.at(radius) == certified_accuracy(CERTIFICATES, LABELS, [radius])[radius]


def test_average_certified_radius_counts_wrong_answers_as_zero() -> None:
    assert average_certified_radius(CERTIFICATES, LABELS) == pytest.approx(0.75 / 4)


@pytest.mark.parametrize("labels", [[], [1], [1, 2, 3, 4, 5]], ids=len)
def test_a_label_per_certificate_is_needed(labels: list[int]) -> None:
    with pytest.raises(RequestError, match="one label per certificate"):
        certified_accuracy(CERTIFICATES, labels, [0.0])
    with pytest.raises(RequestError, match="one label per certificate"):
        average_certified_radius(CERTIFICATES, labels)


def test_nothing_certified_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one"):
        average_certified_radius([], [])
