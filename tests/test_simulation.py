"""The simulated step: by hand where it can be done, and what has to hold of any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulation import Costs, Load, saturation, simulate

FREE = Costs(0.0, 0.0, 0.0, 0.0, 0.0, 1e12)


def test_one_worker_does_one_thing_after_the_other() -> None:
    step = simulate(Load((3.0, 2.0, 1.0), base=0.5, theta=0), FREE, 1)
    assert (step.seconds, step.coordinator, step.workers) == (6.5, 0.0, 1.0)


def test_a_step_by_hand() -> None:
    """Two workers, three equal tasks, which take the client 0.2 s each and the coordinator 0.1 s each way."""
    costs = Costs(step=1.0, client_task=0.4, coordinator_task=0.2, coordinator_worker=0.0, round_trip=2.0, bandwidth=1)
    step = simulate(Load((10.0, 10.0, 10.0), base=0.0, theta=0), costs, 2)
    # Sent at 1.2, 1.4, 1.6; handed out 0.1 later and there 1 s later: 2.3, 2.5, 2.7. The third waits for the first.
    # Answers of the first worker are with the coordinator at 13.3 and 23.3, taken 0.1 later, gathered 3 · 0.2 later.
    assert step.seconds == pytest.approx(24.0)
    assert step.coordinator * step.seconds == pytest.approx(3 * 0.2)
    assert step.workers * step.seconds == pytest.approx(15.0)


def test_every_worker_makes_its_own_base_pass() -> None:
    assert simulate(Load((1.0,) * 8, base=2.0, theta=0), FREE, 8).seconds == 3.0


def test_theta_from_one_worker_is_slower_than_from_several() -> None:
    load, costs = Load((1.0,) * 64, base=0.0, theta=1000), Costs(0.0, 0.0, 0.0, 0.0, 0.0, bandwidth=1000.0)
    assert simulate(load, costs, 64).seconds == 64.0, "the last of 63 copies leaves after 63 s"
    # The eighth copy is there after 7 s, and each of the eight is sent seven times.
    assert simulate(load, costs, 64, copies=8).seconds == 15.0


def test_the_coordinator_bounds_the_step() -> None:
    costs = Costs(0.0, 0.0, coordinator_task=0.01, coordinator_worker=0.0, round_trip=0.0, bandwidth=1e12)
    step = simulate(Load((0.5,) * 1000, base=0.0, theta=0), costs, 1000)
    assert step.seconds >= 10.0 and step.coordinator > 0.9


@given(
    tasks=st.lists(st.floats(1e-6, 10), min_size=1, max_size=60),
    base=st.floats(0, 1),
    theta=st.integers(0, 10**6),
    workers=st.integers(1, 80),
    small=st.floats(0, 0.01),
)
def test_what_has_to_hold_of_any_step(tasks: list[float], base: float, theta: int, workers: int, small: float) -> None:
    costs = Costs(small, small, small, small, small, 1e8)
    load = Load(tuple(tasks), base, theta)
    step = simulate(load, costs, workers)
    used = min(workers, len(tasks))
    assert step.seconds >= max(max(tasks) + base, sum(tasks) / used + base / used) - 1e-9
    assert step.seconds >= len(tasks) * small
    assert 0 <= step.coordinator <= 1 + 1e-9 and 0 <= step.workers <= 1 + 1e-9
    assert simulate(load, costs, workers) == step


def test_saturation_is_where_doubling_gains_less_than_a_tenth() -> None:
    assert saturation([(1, 8.0), (2, 4.0), (4, 2.0), (8, 1.9), (16, 1.0)]) == 4
    assert saturation([(1, 8.0), (2, 4.0)]) == 2
