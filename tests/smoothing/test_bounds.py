"""Bounds on a probability: against scipy, against the integral they stand for, and by simulation at every stop."""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta, binom, binomtest, norm

from deepzero_core.smoothing.bounds import (
    evidence_against,
    lower_bound,
    radius_of,
    sequence_lower,
    sequence_upper,
)


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
@pytest.mark.parametrize(("hits", "trials"), [(0, 9), (1, 9), (9, 9), (83, 100), (9_990, 10_000)])
def test_the_fixed_bound_is_scipys(hits: int, trials: int, alpha: float) -> None:
    exact = binomtest(hits, trials, alternative="greater").proportion_ci(confidence_level=1 - alpha, method="exact").low
    found = lower_bound(hits, trials, alpha)
    assert found == pytest.approx(exact, rel=1e-9, abs=1e-12)
    # By its definition: so many hits or more have probability alpha at the bound.
    assert binom.sf(hits - 1, trials, found) == pytest.approx(alpha if hits else 1.0, rel=1e-9)


@pytest.mark.parametrize(("hits", "trials"), [(3, 5), (0, 4), (50, 50), (180, 200)])
@pytest.mark.parametrize("p", [0.2, 0.9])
def test_the_evidence_is_the_averaged_likelihood_ratio(hits: int, trials: int, p: float) -> None:
    def likelihood(q: float) -> float:
        return float(binom.pmf(hits, trials, q) / binom.pmf(hits, trials, p))

    # In 1 − q = u^10, so that the prior Beta(1, 0.1), which is infinite at 1, is flat.
    average, _ = quad(lambda u: likelihood(1 - u**10), 0, 1, limit=200, epsabs=0, epsrel=1e-10)
    assert evidence_against(p, hits, trials) == pytest.approx(math.log(average), abs=1e-6)


@pytest.mark.parametrize(("hits", "trials"), [(0, 40), (40, 40), (300, 400), (9_999, 10_000), (5_000, 10_000)])
def test_the_interval_is_where_the_evidence_stays_below_its_limit(hits: int, trials: int) -> None:
    alpha = 0.01
    lower, upper = sequence_lower(hits, trials, alpha), sequence_upper(hits, trials, alpha)
    assert 0 <= lower <= hits / trials <= upper <= 1
    for end, beyond in ((lower, lower * 0.999), (upper, 1 - (1 - upper) * 0.999)):
        if 0 < end < 1:
            assert evidence_against(end, hits, trials) == pytest.approx(-math.log(alpha), abs=1e-4)
            assert evidence_against(beyond, hits, trials) > -math.log(alpha)
    assert (lower == 0) == (hits == 0) and (upper == 1) == (hits == trials)
    assert lower < lower_bound(hits, trials, alpha) or hits == 0, "what holds at all times is wider"


def test_nothing_is_excluded_before_there_are_trials() -> None:
    assert (sequence_lower(0, 0, 0.1), sequence_upper(0, 0, 0.1)) == (0.0, 1.0)


@pytest.mark.parametrize("p", [0.5, 0.84, 0.99])
def test_whoever_stops_when_the_answer_pleases_is_wrong_no_more_often_than_stated(p: float) -> None:
    """Stop when p itself is excluded, the worst that stopping can do; and a bound for a fixed number fails at it."""
    alpha, runs, length = 0.1, 600, 600
    hits = (np.random.default_rng(1).random((runs, length)) < p).cumsum(axis=1)
    limit = -math.log(alpha)
    excluded = sum(any(evidence_against(p, int(h), t) >= limit for t, h in enumerate(run, 1)) for run in hits)
    # Were the confidence 1 − α, more than this would happen once in a million runs.
    assert 0 < excluded <= binom.ppf(1 - 1e-6, runs, alpha)
    naive = beta.ppf(alpha, hits, np.arange(1, length + 1) - hits + 1)
    assert (naive > p).any(axis=1).sum() > binom.ppf(1 - 1e-6, runs, alpha), "this test can fail"


def test_the_radius_is_that_of_the_bound() -> None:
    assert radius_of(0.9, 0.25) == pytest.approx(0.25 * norm.ppf(0.9), rel=1e-12)
    assert radius_of(0.5, 0.25) == radius_of(0.0, 1.0) == 0.0
