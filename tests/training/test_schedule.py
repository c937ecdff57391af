"""The learning rate at every step, and schedules that cannot be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepzero_core.errors import RequestError
from deepzero_core.training import Schedule


def test_warm_up_rises_linearly_to_the_peak_and_the_cosine_falls_from_it() -> None:
    schedule = Schedule(0.4, steps=12, warmup_steps=4)
    rates = [schedule.at(step) for step in range(12)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[8] == pytest.approx(0.2), "half of the peak half-way down"
    assert rates[4:] == pytest.approx([0.2 * (1 + math.cos(math.pi * t / 8)) for t in range(8)])
    assert schedule.at(12) == pytest.approx(0.0, abs=1e-12)


def test_it_is_torch_s_cosine() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    schedule = Schedule(0.3, steps=9)
    for step in range(9):
        assert schedule.at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        cosine.step()


def test_a_constant_schedule_is_constant_after_its_warm_up() -> None:
    schedule = Schedule(0.5, steps=6, warmup_steps=2, name="constant")
    assert [schedule.at(step) for step in range(6)] == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5, 0.5])


@given(
    steps=st.integers(1, 300),
    share=st.floats(0, 1),
    name=st.sampled_from(["cosine", "constant"]),
    peak=st.floats(1e-6, 10),
)
def test_rates_lie_between_zero_and_the_peak(steps: int, share: float, name: str, peak: float) -> None:
    warmup = int(share * steps)
    schedule = Schedule(peak, steps, warmup, name)
    rates = [schedule.at(step) for step in range(steps)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates), "no step is lost to a rate of zero"
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"unknown schedule 'cosin'.*did you mean 'cosine'"):
        Schedule(0.1, 10, name="cosin")


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warm_up_that_does_not_fit_is_refused(warmup: int) -> None:
    with pytest.raises(RequestError, match=rf"warm-up of {warmup} steps does not fit a run of 10 steps"):
        Schedule(0.1, 10, warmup)
