"""What the training of a corrector will take: every method is timed, and what is continued is continued rightly."""

import pytest
import torch
from torch import nn

import configs
from configs.solver_loop import SolverLoop
from tasks import loop_prediction
from tasks.loop_prediction import _spread_out, training_seconds


def load(*overrides: str) -> SolverLoop:
    experiment = configs.load("smoke", overrides, flow="solver-loop")
    assert isinstance(experiment, SolverLoop)
    return experiment


def test_a_straight_line_through_two_timings_and_loops_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(
        source: object, module: object, inputs: object, targets: object, coordinates: dict | None = None
    ) -> float:
        # A second for the base, and a tenth for every coordinate.
        count = 0 if coordinates is None else sum(len(indices) for indices in coordinates.values())
        asked.append((type(source).__name__, count))
        return 1 + count / 10

    monkeypatch.setattr(loop_prediction, "_timed", timed)
    found = training_seconds(load("baselines=[src, non, sol-fo]", "training.queries=41"))
    assert asked == [("ZerothOrderLoop", 1), ("ZerothOrderLoop", 5), ("NonInteractive", 0), ("FirstOrderLoop", 0)]
    # Two steps with m = 2 and two with m = 3, in proportion to the three of the loop that was timed.
    share = 2 * 2 / 3 + 2
    assert found == pytest.approx({"sol-zo": (1 + 40 / 10) * share, "non": 4 * 1, "sol-fo": 1 * share})


def test_a_real_step_is_timed_and_ones_own_simulator_left_in_peace() -> None:
    found = training_seconds(load("baselines=[src, non, sol-zo-split]", "corrector.name=small"))
    assert list(found) == ["sol-zo", "non", "sol-zo-split"] and all(seconds > 0 for seconds in found.values())
    own = load(
        "simulator={kind: external, field: u, settings: {command: [none], state_shapes: {u: [4]}}}",
        "corrector.name=my.networks:corrector",
        "cases.function=my.cases:make",
        "baselines=[src]",
    )
    assert training_seconds(own) == {}


def test_coordinates_are_spread_out_evenly() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))  # 12, 4, 4 and 1 parameters
    chosen = _spread_out(module, 7)
    assert {name: indices.tolist() for name, indices in chosen.items()} == {
        "0.weight": [0, 3, 6, 9],
        "0.bias": [0, 3],
        "1.weight": [2],
    }
    assert sum(len(indices) for indices in _spread_out(module, 1000).values()) == 21
    assert all(indices.dtype == torch.int64 for indices in chosen.values())
