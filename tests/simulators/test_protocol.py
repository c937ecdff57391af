"""Every simulator, tried on functions: what is refused, who dies, what is counted."""

import pickle

import numpy as np
import pytest
import torch

from deepzero_core.errors import RequestError
from simulators.function import FunctionSimulator
from simulators.protocol import Statistics, alive


def double(state: dict, params: dict) -> dict:
    return {"u": state["u"] * params["by"][:, None]}


def simulator(function=double, **settings) -> FunctionSimulator:
    return FunctionSimulator(function, state_shapes={"u": (3,)}, param_shapes={"by": ()}, **settings)


def state(count: int = 4) -> dict[str, torch.Tensor]:
    return {"u": torch.arange(3.0 * count).view(count, 3)}


def by(*values: float) -> dict[str, torch.Tensor]:
    return {"by": torch.tensor(values)}


def test_a_step_is_the_function() -> None:
    box = simulator()
    after = box.step(state(), by(2, 3, 4, 5))
    assert torch.equal(after["u"], state()["u"] * torch.tensor([2.0, 3, 4, 5])[:, None])
    assert (box.statistics.steps, box.statistics.diverged, box.statistics.crashed) == (4, 0, 0)
    assert box.statistics.steps_per_second > 0


@pytest.mark.parametrize(
    ("given", "params", "sentence"),
    [
        ({}, by(1), "the state lacks the field 'u', of shape \\[N, 3\\]"),
        ({"u": torch.zeros(2, 4)}, by(1, 1), "'u' of the state has the shape \\[2, 4\\]; it must be \\[N, 3\\]"),
        ({"u": torch.zeros(2, 3), "w": torch.zeros(2, 3)}, by(1, 1), "a field 'w' that the simulator does not know"),
        ({"u": torch.zeros(2, 3)}, {}, "the parameters lacks the field 'by'"),
        ({"u": torch.zeros(2, 3)}, by(1, 1, 1), "the state is of 2 simulations, the parameters of 3"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict, params: dict, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        simulator().step(given, params)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_who_diverges_is_dead_and_counted_once(bad: float) -> None:
    def second_diverges(state: dict, params: dict) -> dict:
        return {"u": np.where(state["u"] == 3.0, bad, state["u"])}

    box = simulator(second_diverges, limit=1e6)
    after = box.step(state(), by(1, 1, 1, 1))
    assert alive(after).tolist() == [True, False, True, True]
    assert after["u"][1].isnan().all()
    again = box.step(after, by(1, 1, 1, 1))
    assert alive(again).tolist() == [True, False, True, True]
    assert torch.equal(again["u"][[0, 2, 3]], state()["u"][[0, 2, 3]])
    assert (box.statistics.steps, box.statistics.diverged) == (7, 1)


def test_the_dead_are_not_asked() -> None:
    asked = []

    def recording(state: dict, params: dict) -> dict:
        asked.append(len(state["u"]))
        return state

    dead = {"u": torch.full((2, 3), torch.nan)}
    after = simulator(recording).step(dead, by(1, 1))
    assert asked == []
    assert after["u"].isnan().all()


def test_a_crash_takes_its_batch_alone() -> None:
    def crashes_at_six(state: dict, params: dict) -> dict:
        if (state["u"] == 6).any():
            raise ValueError("no convergence")
        return state

    box = simulator(crashes_at_six, batch_size=2)
    assert alive(box.step(state(), by(1, 1, 1, 1))).tolist() == [True, True, False, False]
    assert box.statistics.crashed == 2
    assert box.statistics.last_error == "the function crashes_at_six raised ValueError: no convergence"


def test_an_answer_of_another_shape_is_refused() -> None:
    with pytest.raises(RequestError, match=r"answered the shape \(4, 2\) for 'u'; it must be \(4, 3\)"):
        simulator(lambda state, params: {"u": state["u"][:, :2]}).step(state(), by(1, 1, 1, 1))
    with pytest.raises(RequestError, match="answered nothing for 'u'"):
        simulator(lambda state, params: {}).step(state(), by(1, 1, 1, 1))


def test_the_derivative_is_torchs_and_the_dead_have_none() -> None:
    box = simulator(differentiable=True, limit=100)
    u = state()["u"].requires_grad_()
    after = box.step({"u": u}, by(2, 3, 1e3, 5))
    torch.where(alive(after)[:, None], after["u"], 0).sum().backward()
    assert u.grad is not None
    assert torch.equal(u.grad, torch.tensor([2.0, 3, 0, 5])[:, None].expand(4, 3))


def test_no_simulations_are_no_work() -> None:
    box = simulator()
    assert box.step({"u": torch.empty(0, 3)}, {"by": torch.empty(0)})["u"].shape == (0, 3)
    assert box.statistics.steps == 0


def test_a_copy_counts_anew() -> None:
    box = simulator()
    box.step(state(), by(1, 1, 1, 1))
    copy = pickle.loads(pickle.dumps(box))
    assert copy.statistics == Statistics()
    assert torch.equal(copy.step(state(), by(1, 1, 1, 1))["u"], state()["u"])


def test_statistics_add_up() -> None:
    both = Statistics(1, 2, 3, 4, 0.5, "first") + Statistics(1, 1, 1, 1, 0.5)
    assert both == Statistics(2, 3, 4, 5, 1.0, "first")


def test_settings_are_checked() -> None:
    with pytest.raises(RequestError, match="limit"):
        simulator(limit=0)
    with pytest.raises(RequestError, match="batch_size"):
        simulator(batch_size=0)
