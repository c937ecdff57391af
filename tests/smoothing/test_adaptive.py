"""Adaptive certification: the guarantee of the fixed one, the same decisions at the asked radii, fewer samples."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor

from deepzero_core.smoothing import Certificate, Certification, certify, certify_many
from deepzero_core.smoothing.adaptive import FUTILE, LOOK, adaptive
from deepzero_core.smoothing.bounds import lower_bound, radius_of
from deepzero_core.smoothing.courses import Course, fixed

RADII = (0.25, 0.5, 0.75)
SIGMA = 0.25


def settings(n: int = 2_000, alpha: float = 0.001, *, stops: bool = True, n0: int = 100) -> Certification:
    return Certification(SIGMA, n0, n, alpha, 1_000, stops, RADII)


def played(course: Course[Certificate], p: float, random: np.random.Generator) -> Certificate:
    """The certificate of an example whose class 1 has probability p: what a classifier would answer, drawn at once."""
    wanted = next(course)
    try:
        while True:
            hits = int(random.binomial(wanted, p))
            wanted = course.send(torch.tensor([wanted - hits, hits]))
    except StopIteration as end:
        certificate: Certificate = end.value
        return certificate


@pytest.mark.parametrize("p", [0.5, norm.cdf(1.0), 0.9, norm.cdf(2.0), 0.999], ids=lambda p: f"{p:.4f}")
def test_the_bound_is_above_the_probability_no_more_often_than_stated(p: float) -> None:
    """At the probabilities that asked radii need stopping is most tempting."""
    alpha, trials, random = 0.1, 500, np.random.default_rng(2)
    wanted = settings(400, alpha)
    certificates = [played(adaptive(wanted), p, random) for _ in range(trials)]
    wrong = sum(c.p_lower > (p if c.label != 0 else 1 - p) for c in certificates)
    assert wrong <= binom.ppf(1 - 1e-6, trials, alpha)


def test_over_linear_classifiers_the_radius_is_above_the_true_one_no_more_often_than_stated() -> None:
    normal, alpha, trials = torch.tensor([3.0, -4.0]), 0.1, 300
    source = torch.Generator().manual_seed(4)

    def halves(images: Tensor) -> Tensor:
        signed = images @ normal
        return torch.stack([-signed, signed], dim=1)

    wrong = 0
    for number in range(trials):
        true = RADII[number % len(RADII)] - 1e-3
        certificate = certify(
            halves, normal / 5 * true, sigma=SIGMA, n0=20, n=300, alpha=alpha, batch_size=300, generator=source,
            adaptive=True, radii=RADII,
        )  # fmt: skip
        wrong += certificate.label == 0 or certificate.radius > true
    assert wrong <= binom.ppf(1 - 1e-6, trials, alpha)


@pytest.mark.parametrize("p", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_the_decisions_are_those_of_all_samples(p: float) -> None:
    """Up to what half of α and futility cost near a threshold, which none of these is: p needs 0.5, 0.841, 0.977."""
    random = np.random.default_rng(3)
    for radius in (0.0, *RADII):
        shares = [
            np.mean([_certified(played(kind(settings()), p, random), radius) for _ in range(40)])
            for kind in (adaptive, fixed)
        ]
        assert abs(shares[0] - shares[1]) <= 0.15


def _certified(certificate: Certificate, radius: float) -> bool:
    return not certificate.abstained and certificate.radius >= radius


@pytest.mark.parametrize("p", [0.2, 0.7, 0.95, 1.0])
def test_most_samples_are_saved_where_the_answer_is_clear(p: float) -> None:
    random = np.random.default_rng(5)
    certificates = [played(adaptive(settings(10_000)), p, random) for _ in range(20)]
    for certificate in certificates:
        assert certificate.samples + certificate.saved == 10_100
    saved = np.mean([certificate.saved for certificate in certificates]) / 10_100
    assert saved > (0.3 if p == 1.0 else 0.85)  # radius 0.75 takes thousands of hits in a row


def test_the_last_sample_is_used_where_nothing_is_clear() -> None:
    answers = iter(range(10**6))

    def undecided(images: Tensor) -> Tensor:
        # Class 1 in every second answer and class 0 in the others: p stays at a half, where abstaining is not settled
        # before it becomes unlikely that the rest changes it.
        return torch.nn.functional.one_hot(torch.tensor([next(answers) % 2 for _ in images]), 2).float()

    certificate = certify(
        undecided, torch.zeros(2), sigma=SIGMA, n0=100, n=1_000, alpha=0.001, batch_size=64,
        generator=torch.Generator(), adaptive=True,
    )  # fmt: skip
    assert certificate.abstained and certificate.samples > 500


def test_the_choice_of_the_class_stops_when_it_cannot_change() -> None:
    course = adaptive(settings(n0=100))
    assert next(course) == LOOK
    assert course.send(torch.tensor([0, LOOK, 0])) == LOOK
    # 64 of 100 copies agree, and 36 are left: what is asked for next is for the bound, and agrees as well.
    assert course.send(torch.tensor([0, LOOK, 0])) == LOOK
    certificate, classified = _finished(course, [0, 1, 0])
    assert (certificate.label, certificate.samples) == (1, 2 * LOOK + classified)
    tied = adaptive(settings(n0=2 * LOOK + 1))
    assert [next(tied), tied.send(torch.tensor([LOOK // 2, LOOK // 2])), tied.send(torch.tensor([0, LOOK]))] == [
        LOOK,
        LOOK,
        LOOK,
    ]


def _finished(course: Course[Certificate], shares: list[int]) -> tuple[Certificate, int]:
    """The certificate where all answers from now on are alike, and how many copies they are."""
    classified = wanted = LOOK
    try:
        while True:
            wanted = course.send(torch.tensor(shares) * wanted)
            classified += wanted
    except StopIteration as end:
        return end.value, classified


def test_futility_loses_few_of_those_that_all_samples_would_certify() -> None:
    """At the probability at which half of all examples are certified at 0.25 with all samples."""
    wanted, random = settings(500), np.random.default_rng(6)
    hits = next(h for h in range(wanted.n) if radius_of(lower_bound(h, wanted.n, wanted.alpha / 2), SIGMA) >= 0.25)
    p = next(p for p in np.arange(0.85, 0.95, 0.002) if binom.sf(hits - 1, wanted.n, p) > 0.5)
    trials = 400
    found = sum(_certified(played(adaptive(wanted), p, random), 0.25) for _ in range(trials))
    assert found / trials > 0.5 - 2 * FUTILE - 5 * np.sqrt(0.25 / trials)


@pytest.mark.parametrize("stops", [False, True], ids=["fixed", "adaptive"])
def test_many_at_once_are_one_by_one(stops: bool) -> None:
    images = torch.linspace(-0.6, 0.6, 23).unsqueeze(1) * torch.tensor([0.6, 0.8])

    def classifier(seen: list[int]) -> Callable[[Tensor], Tensor]:
        def scores(batch: Tensor) -> Tensor:
            seen.append(len(batch))
            signed = (batch * torch.tensor([0.6, 0.8])).sum(1)
            return torch.stack([-signed, signed, torch.full_like(signed, 0.1)], 1)

        return scores

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in range(len(images))]

    wanted = Certification(SIGMA, 50, 700, 0.01, 256, stops, RADII)
    sizes: list[int] = []
    together = list(certify_many(classifier(sizes), images, wanted, generators=generators()))
    alone = [
        next(certify_many(classifier([]), [x], Certification(SIGMA, 50, 700, 0.01, 7, stops, RADII), generators=[g]))
        for x, g in zip(images, generators(), strict=True)
    ]
    assert together == alone
    assert {0, 1} < {c.label for c in together}
    assert (len({c.samples for c in together}) > 3) == stops
    full = sum(size == 256 for size in sizes)
    assert full >= 0.5 * len(sizes), "batches are as full as can be"
    assert sum(sizes) == sum(c.samples for c in together), "nothing is classified that no answer rests on"
