"""Certification against a classifier whose smoothed radius is known in closed form.

f(x) = 1 where w·x > 0, else 0. For x on the side of class 1, P[f(x + ε) = 1] = Φ(w·x/(σ‖w‖)), so the radius of the
smoothed classifier is the distance to the plane, w·x/‖w‖, for every σ.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import beta, binom, binomtest, norm
from torch import Tensor, nn

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.smoothing import ABSTAIN, Certificate, Certification, certify, certify_many, predict
from deepzero_core.smoothing.copies import BLOCK, NoisyCopies

NORMAL = torch.tensor([[2.0, -1.0], [0.5, 1.0]])  # the shape of x: [2, 2]


def halves(images: Tensor) -> Tensor:
    signed = (images * NORMAL).flatten(1).sum(dim=1)
    return torch.stack([-signed, signed], dim=1)


def at_distance(radius: float) -> Tensor:
    return NORMAL / NORMAL.norm() * radius


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_the_radius_is_above_the_true_one_no_more_often_than_stated(sigma: float) -> None:
    true, alpha, trials = 0.8 * sigma, 0.1, 400
    source = generator(1)
    certificates = [
        certify(halves, at_distance(true), sigma=sigma, n0=20, n=150, alpha=alpha, batch_size=150, generator=source)
        for _ in range(trials)
    ]
    failures = sum(certificate.label != 1 or certificate.radius > true for certificate in certificates)
    # Were the confidence 1 − alpha, more failures than this would happen once in a million runs.
    assert failures <= binom.ppf(1 - 1e-6, trials, alpha)
    # And were the bound idle, it would never fail.
    assert failures > 0


@pytest.mark.parametrize("distance", [0.1, 0.25, 0.4])
def test_the_radius_approaches_the_true_one(distance: float) -> None:
    certificate = certify(
        halves,
        at_distance(distance),
        sigma=0.25,
        n0=100,
        n=100_000,
        alpha=0.001,
        batch_size=5_000,
        generator=generator(),
    )
    assert certificate.label == 1
    # Three standard errors of p below, carried through Φ⁻¹: under 0.006 for the distances here.
    assert distance - 0.008 < certificate.radius < distance


def test_both_sides_of_the_plane_are_alike() -> None:
    left = certify(
        halves, at_distance(-0.3), sigma=0.25, n0=50, n=2_000, alpha=0.01, batch_size=500, generator=generator()
    )
    assert left.label == 0
    assert 0.2 < left.radius < 0.3


def scripted(answers: list[int], classes: int = 3) -> Callable[[Tensor], Tensor]:
    """A classifier that gives these answers in turn, whatever it is shown."""
    queue = list(answers)

    def classifier(images: Tensor) -> Tensor:
        taken = [queue.pop(0) for _ in range(len(images))]
        return nn.functional.one_hot(torch.tensor(taken), classes).float()

    return classifier


@pytest.mark.parametrize(
    ("hits", "n", "alpha"), [(100, 100, 0.001), (55, 100, 0.05), (83, 100, 0.001), (60, 64, 0.05), (1, 9, 0.2)]
)
def test_p_lower_is_the_one_sided_clopper_pearson_bound(hits: int, n: int, alpha: float) -> None:
    classifier = scripted([2] * 5 + [2] * hits + [1] * (n - hits))
    certificate = certify(
        classifier,
        torch.zeros(2),
        sigma=0.5,
        n0=5,
        n=n,
        alpha=alpha,
        batch_size=7,
        generator=generator(),
    )
    expected = binomtest(hits, n, alternative="greater").proportion_ci(confidence_level=1 - alpha, method="exact").low
    assert certificate.p_lower == pytest.approx(expected, rel=1e-9)
    assert certificate.p_lower == pytest.approx(beta.ppf(alpha, hits, n - hits + 1), rel=1e-9)
    assert certificate.samples == 5 + n
    if expected > 0.5:
        assert certificate.label == 2
        assert certificate.radius == pytest.approx(0.5 * norm.ppf(expected), rel=1e-8)
    else:
        assert certificate.label == ABSTAIN == -1
        assert certificate.radius == 0.0


def test_the_class_is_chosen_by_the_selection_samples_alone() -> None:
    # Selection says 0; estimation, 1 throughout: there is no bound on class 0 worth having, so it abstains.
    certificate = certify(
        scripted([0, 0, 1] + [1] * 50),
        torch.zeros(2),
        sigma=0.5,
        n0=3,
        n=50,
        alpha=0.01,
        batch_size=10,
        generator=generator(),
    )
    assert certificate == Certificate(label=-1, radius=0.0, samples=53, p_lower=0.0)
    assert certificate.abstained


def test_on_the_plane_it_abstains() -> None:
    settings = {"sigma": 0.25, "n": 500, "alpha": 0.001, "batch_size": 100}
    assert certify(halves, at_distance(0.0), n0=20, generator=generator(), **settings).abstained
    assert predict(halves, at_distance(0.0), generator=generator(), **settings) == ABSTAIN


def test_the_largest_radius_of_the_papers_setting_is_about_0_8() -> None:
    always_one = scripted([1] * 10_100)
    certificate = certify(
        always_one,
        torch.zeros(1),
        sigma=0.25,
        n0=100,
        n=10_000,
        alpha=0.001,
        batch_size=1_000,
        generator=generator(),
    )
    assert certificate.radius == pytest.approx(0.25 * norm.ppf(0.001**1e-4), rel=1e-9)
    assert 0.79 < certificate.radius < 0.81


@pytest.mark.parametrize(
    ("counts", "alpha", "answer"),
    [
        ((8, 2, 0), 0.11, 0),  # two-sided p-value 0.109
        ((8, 2, 0), 0.10, ABSTAIN),
        ((2, 8, 20), 0.05, 2),  # 20 against 8: 0.036; the third class does not count
        ((2, 8, 20), 0.03, ABSTAIN),
        ((0, 0, 11), 0.001, 2),  # 2⁻¹⁰ = 0.00098
        ((0, 0, 10), 0.001, ABSTAIN),
        ((5, 5, 5), 0.5, ABSTAIN),
    ],
)
def test_predict_is_the_two_sided_binomial_test_of_the_first_two(
    counts: tuple[int, int, int], alpha: float, answer: int
) -> None:
    answers = [label for label, count in enumerate(counts) for _ in range(count)]
    classifier = scripted(answers)
    predicted = predict(
        classifier,
        torch.zeros(2),
        sigma=1.0,
        n=len(answers),
        alpha=alpha,
        batch_size=4,
        generator=generator(),
    )
    assert predicted == answer


def test_predict_is_wrong_no_more_often_than_stated() -> None:
    alpha, trials = 0.2, 400
    source = generator(3)
    settings = {"sigma": 1.0, "n": 30, "alpha": alpha, "batch_size": 30, "generator": source}
    answers = [predict(halves, at_distance(0.05), **settings) for _ in range(trials)]
    assert answers.count(0) <= binom.ppf(1 - 1e-6, trials, alpha)
    assert answers.count(ABSTAIN) > 0


@pytest.mark.parametrize("shape", [(5,), (1, 4, 4), (3, 7, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_samples_do_not_depend_on_the_batch_size(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def run(batch_size: int) -> tuple[Tensor, Certificate, Tensor]:
        seen: list[Tensor] = []

        def classifier(images: Tensor) -> Tensor:
            assert len(images) <= batch_size
            assert images.dtype == dtype
            seen.append(images)
            total = images.flatten(1).sum(dim=1)
            return torch.stack([-total, total], dim=1)

        source = generator(5)
        x = torch.full(shape, 0.1, dtype=dtype)
        certificate = certify(
            classifier, x, sigma=0.5, n0=10, n=37, alpha=0.05, batch_size=batch_size, generator=source
        )
        return torch.cat(seen), certificate, source.get_state()

    samples, certificate, state = run(1)
    for batch_size in (2, 16, 37, 1000):
        others, other, end = run(batch_size)
        assert torch.equal(others, samples)
        assert other == certificate
        assert torch.equal(end, state)


@pytest.mark.parametrize("shape", [(3,), (1, 8, 8), (3, 70, 90)], ids=str)
@pytest.mark.parametrize("sizes", [[1] * 11, [4, 7], [11], [0, 10, 1]], ids=str)
def test_copies_are_rows_of_draws_of_one_size(shape: tuple[int, ...], sizes: list[int]) -> None:
    """The plain way: draw whole blocks, lay them end to end, add x."""
    x, source, same = torch.full(shape, 0.5), generator(7), generator(7)
    rows = max(1, -(-BLOCK // x.numel()))
    drawn = [torch.empty(rows, *shape).normal_(0, 0.25, generator=source) for _ in range(-(-11 // rows))]
    expected = torch.cat(drawn)[:11] + x
    copies, out = NoisyCopies(x, 0.25, same), torch.empty(11, *shape)
    for part in out.split(sizes):
        copies.write(part)
    assert torch.equal(out, expected)
    assert torch.equal(source.get_state(), same.get_state())


def test_certify_is_the_published_algorithm() -> None:
    """CERTIFY of Cohen et al. in a few plain lines, on the same copies."""
    x, sigma, n0, n, alpha = at_distance(0.2), 0.25, 30, 500, 0.01
    copies, noisy = NoisyCopies(x, sigma, generator(9)), torch.empty(n0 + n, 2, 2)
    copies.write(noisy)
    answers = [int(halves(copy.unsqueeze(0)).argmax()) for copy in noisy]
    chosen = max((0, 1), key=answers[:n0].count)
    hits = answers[n0:].count(chosen)
    p_lower = beta.ppf(alpha, hits, n - hits + 1)
    certificate = certify(halves, x, sigma=sigma, n0=n0, n=n, alpha=alpha, batch_size=64, generator=generator(9))
    assert (certificate.label, certificate.samples, certificate.saved) == (chosen, n0 + n, 0)
    assert certificate.radius == pytest.approx(sigma * norm.ppf(p_lower), rel=1e-9)


def test_the_noise_is_standard_normal_times_sigma_and_the_global_state_is_untouched() -> None:
    seen: list[Tensor] = []

    def classifier(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(images)
        return images[:, :2]

    state = torch.random.get_rng_state()
    predict(classifier, torch.ones(20), sigma=0.25, n=5_000, alpha=0.1, batch_size=999, generator=generator())
    assert torch.equal(torch.random.get_rng_state(), state)
    noise = (torch.cat(seen) - 1.0) / 0.25
    # 100,000 values: standard errors 0.0032 of the mean, 0.0022 of the standard deviation; five of them.
    assert abs(float(noise.mean())) < 0.016
    assert abs(float(noise.std()) - 1) < 0.011


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": 0.0}, "sigma.* must be positive and finite, but is 0.0"),
        ({"sigma": -1.0}, "sigma.* must be positive"),
        ({"sigma": math.nan}, "sigma.* must be positive"),
        ({"sigma": math.inf}, "sigma.* must be positive and finite"),
        ({"alpha": 0.0}, "alpha.* between 0 and 1"),
        ({"alpha": 1.0}, "alpha.* between 0 and 1"),
        ({"n": 0}, "n must be a whole number of at least 1, but is 0"),
        ({"n": 10.5}, "n must be a whole number"),
        ({"n0": 0}, "n0 must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"x": torch.zeros(2, 2, dtype=torch.uint8)}, "floating type.* torch.uint8"),
        ({"classifier": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4))}, "BatchNorm in training mode"),
        ({"classifier": lambda images: images.flatten(1)[:, :1]}, r"shape \[10, K ≥ 2\], but answered with \[10, 1\]"),
        ({"classifier": lambda images: images.flatten(1).sum(1)}, r"answered with \[10\]"),
        ({"classifier": lambda images: torch.zeros(1, 2)}, r"answered with \[1, 2\]"),
        ({"classifier": lambda images: [0.5, 0.5]}, "answer with a tensor of scores, not list"),
        ({"classifier": lambda images: torch.zeros(len(images), 2, dtype=torch.complex64)}, "can be ordered"),
        ({"classifier": nn.Linear(5, 2)}, r"cannot take images of shape \[10, 2, 2\]: RuntimeError: mat1"),
        ({"x": torch.zeros(0, 2)}, r"x must have values, but has the shape \[0, 2\]"),
        ({"x": torch.tensor([[math.nan, 0.0]])}, "x holds values that are not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"classifier": halves, "x": at_distance(0.5), "sigma": 0.25, "n0": 10, "n": 10}
    arguments |= {"alpha": 0.001, "batch_size": 10, "generator": generator(), **wrong}
    with pytest.raises(RequestError, match=message):
        certify(**arguments)
    if "n0" not in wrong:
        del arguments["n0"]
        with pytest.raises(RequestError, match=message):
            predict(**arguments)


def test_batchnorm_in_evaluation_mode_is_welcome() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)).eval()
    label = predict(classifier, at_distance(2.0), sigma=0.1, n=50, alpha=0.01, batch_size=50, generator=generator())
    assert label == 0  # the coordinate at which the normal vector is largest


def test_scores_that_are_not_numbers_are_a_failure_and_not_a_class() -> None:
    with pytest.raises(WorkError, match="NaN"):
        predict(
            lambda images: torch.full((len(images), 2), math.nan),
            torch.zeros(2),
            sigma=1.0,
            n=5,
            alpha=0.1,
            batch_size=5,
            generator=generator(),
        )


def test_a_classifier_that_fails_later_is_no_mistake_of_the_request() -> None:
    def tired(images: Tensor) -> Tensor:
        if len(images) == 3:
            raise RuntimeError("the connection was lost")
        return halves(images)

    with pytest.raises(RuntimeError, match="connection was lost"):
        certify(tired, at_distance(0.3), sigma=0.25, n0=10, n=13, alpha=0.1, batch_size=10, generator=generator())


@pytest.mark.parametrize("radius", [-1.0, math.nan, math.inf])
def test_an_impossible_radius_is_refused(radius: float) -> None:
    with pytest.raises(RequestError, match="radius must be finite and at least 0"):
        Certification(0.25, 10, 100, 0.01, 10, adaptive=True, radii=(radius,))


@pytest.mark.parametrize(
    ("images", "generators", "message"),
    [
        ([torch.zeros(2, 2), torch.zeros(2, 3)], 2, r"image 1 is \[2, 3\] of torch.float32 on cpu and the first"),
        ([torch.zeros(2, 2), torch.zeros(2, 2).double()], 2, "image 1 is .* of torch.float64"),
        ([torch.zeros(2, 2), torch.zeros(2, 2)], 1, "there is none for image 1"),
    ],
    ids=["shape", "type", "generator"],
)
def test_many_images_have_to_be_alike_and_have_generators(images: list[Tensor], generators: int, message: str) -> None:
    settings = Certification(0.25, 10, 20, 0.1, 64)
    with pytest.raises(RequestError, match=message):
        list(certify_many(halves, images, settings, generators=[generator(i) for i in range(generators)]))
