"""The flows by their names. Prefect is imported with them, so that its settings have to stand by then."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.records import Reported

ENTRYPOINTS = {
    "classify": "flows.classify.classify",
    "pipeline": "flows.pipeline.pipeline",
    "defend": "flows.defend.defend",
    "solver-loop": "flows.solver_loop.solver_loop",
    "study": "flows.study.study",
}

PACKAGES = ("infra", "tasks", "simulators", "deepzero_core")
"""Whose log lines are a run's own."""


def flow_called(name: str) -> "Callable[[Any], Reported]":
    """The flow of that name, one of ENTRYPOINTS."""
    module, _, attribute = ENTRYPOINTS[name].rpartition(".")
    flow: Callable[[Any], Reported] = getattr(importlib.import_module(module), attribute)
    return flow
