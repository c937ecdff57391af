"""A simulator whose ranges others advance: the same bits, the same dead, the same counts."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepzero_core.errors import RequestError
from simulators.contained import RANGES
from simulators.own import own_simulator
from simulators.protocol import alive
from simulators.shared_out import Answer, Member, Question, SharedOut

SETTINGS = {"function": "test_shared_out:moved", "state_shapes": {"u": [3]}, "param_shapes": {"by": []}, "limit": 1e4}


def moved(state: dict, params: dict) -> dict:
    """Crashes where a simulation begins with 6, and leaves the plausible where it begins with 30."""
    if (state["u"][:, 0] == 6).any():
        raise ValueError("no convergence")
    return {"u": np.where(state["u"] == 30, 1e6, state["u"] * params["by"][:, None])}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.syspath_prepend(request.path.parent)


def start(count: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return {"u": torch.arange(3.0 * count).view(count, 3)}, {"by": torch.linspace(-1, 1, count)}


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_it_makes_no_difference_who_advances_a_range(count: int, batch_size: int | None) -> None:
    settings = SETTINGS | ({} if batch_size is None else {"batch_size": batch_size})
    alone, member = own_simulator("function", settings), Member("function", settings)
    shared = SharedOut(own_simulator("function", settings), lambda questions: [member(each) for each in questions])
    (first, params), (second, _) = start(count), start(count)
    for _ in range(2):
        first, second = alone.step(first, params), shared.step(second, params)
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert replace(alone.statistics, seconds=0.0) == replace(shared.statistics, seconds=0.0)
    if count == 100:
        assert (shared.statistics.crashed, shared.statistics.diverged) == ({None: 5, 3: 3}[batch_size], 1)


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (5, 3), (48, 24), (49, 17), (1000, 24)])
def test_a_step_is_cut_by_the_number_of_its_simulations_alone(count: int, expected: int) -> None:
    asked: list[list[Question]] = []
    member = Member("function", SETTINGS)

    def ask(questions: list[Question]) -> list[Answer]:
        asked.append(questions)
        return [member(pickle.loads(pickle.dumps(question))) for question in questions]

    SharedOut(own_simulator("function", SETTINGS), ask).step(*start(count))
    ((*questions,),) = asked
    assert len(questions) == expected <= RANGES
    assert torch.equal(torch.cat([torch.from_numpy(state["u"]) for state, _ in questions]), start(count)[0]["u"])


def test_the_dead_are_not_sent() -> None:
    asked: list[int] = []
    member = Member("function", SETTINGS)

    def ask(questions: list[Question]) -> list[Answer]:
        asked.extend(len(state["u"]) for state, _ in questions)
        return [member(each) for each in questions]

    state, params = start(4)
    state["u"][1] = torch.nan
    after = SharedOut(own_simulator("function", SETTINGS), ask).step(state, params)
    assert asked == [2, 1]
    assert alive(after).tolist() == [False, False, False, True]  # 6 takes the other one of its range with it


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("function", {**SETTINGS, "function": "test_shared_out:moves"}, "did you mean 'moved'"),
        ("function", {**SETTINGS, "limit": "far"}, "simulator.settings do not fit"),
        ("external", {"command": "true", "state_shapes": {"u": [3]}}, "command must be a list"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind: str, settings: dict, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        own_simulator(kind, settings)
