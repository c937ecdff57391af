"""The solver of a stage: here or on workers, and what a simulation costs that ends the process it is advanced by."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.solver_loop import SolverLoop
from infra import dask_settings
from simulators.burgers import Burgers
from simulators.function import FunctionSimulator
from simulators.protocol import alive
from simulators.shared_out import SharedOut
from tasks.solver import open_solver


def fatal(state: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """Triples, and ends its process where a simulation begins with 6."""
    if (state["u"][:, 0] == 6).any():
        os._exit(3)
    return {"u": 3 * state["u"]}


def loop(workers: int, **simulator: Any) -> SolverLoop:
    settings = {"function": "test_solver:fatal", "state_shapes": {"u": [3]}, "batch_size": 1}
    own = {"kind": "function", "field": "u", "settings": settings}
    made = {} if simulator else {"cases": {"function": "own:cases"}, "corrector": {"name": "own:corrector"}}
    return SolverLoop.model_validate({"simulator": simulator or own, "cluster": {"workers": workers}, **made})


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


def test_a_simulation_that_ends_its_worker_has_crashed_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dask_settings.SETTINGS, "distributed.scheduler.allowed-failures", 0)
    with open_solver(loop(1)) as solver:
        assert isinstance(solver, SharedOut)
        after = solver.step({"u": torch.arange(12.0).view(4, 3)}, {})
        assert alive(after).tolist() == [True, True, False, True]
        again = solver.step(after, {})
    assert torch.equal(again["u"][[0, 1, 3]], 9 * torch.arange(12.0).view(4, 3)[[0, 1, 3]])
    assert (solver.statistics.steps, solver.statistics.crashed) == (7, 1)
    assert solver.statistics.last_error == "1 Dask workers were tried, and each of them ended"


@pytest.mark.parametrize(
    ("workers", "simulator", "method", "kind"),
    [
        (0, {}, "sol-zo", FunctionSimulator),
        (2, {}, "sol-fo", FunctionSimulator),
        (2, {"kind": "burgers", "cells": [8, 8]}, "sol-zo", Burgers),
    ],
    ids=["without workers", "to be differentiated", "one of PhiFlow"],
)
def test_others_stay_in_this_process(workers: int, simulator: dict[str, Any], method: str, kind: type) -> None:
    with open_solver(loop(workers, **simulator), method) as solver:
        assert type(solver) is kind
