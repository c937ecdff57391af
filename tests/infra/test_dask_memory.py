"""What a scheduler and its messages keep of steps that are over."""

import gc
from typing import Any

import pytest
from dask.utils import key_split

from infra import dask_memory
from infra.cluster import connect
from infra.dask_memory import NoSpans
from infra.fan_out import FanOut


class Large:
    """Something that a task carries."""


def test_steps_that_are_over_are_forgotten() -> None:
    with connect(1, None, 60) as client:
        spans = client.cluster.scheduler.extensions["spans"]
        assert isinstance(spans, NoSpans)
        for number in range(60):
            assert client.submit(_size, Large(), number, pure=False).result() == number
        gc.collect()
        alive = [each for each in gc.get_objects() if type(each) is Large]
        assert len(alive) <= 30, "the last messages are kept, and no more"
        assert not spans.spans


def test_names_of_tasks_are_forgotten_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_memory, "_NAMES", 50)
    with connect(1, None, 60) as client, FanOut(client, f"{__name__}:Echo", {}) as echo:
        client.run(_few_names)
        for number in range(120):
            assert echo.ask([number]) == [number]
        assert client.run_on_scheduler(_names) <= 60
        assert max(client.run(_names).values()) <= 60


class Echo:
    """A member that answers with the question."""

    def __call__(self, question: int) -> int:
        return question


def _few_names() -> None:
    dask_memory._NAMES = 50


def _names() -> int:
    found: int = key_split.cache_info().currsize
    return found


def _size(_: Any, number: int) -> int:
    return number
