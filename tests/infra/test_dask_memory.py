"""What a scheduler and its messages keep of steps that are over."""

import gc
from typing import Any

from infra.cluster import connect
from infra.dask_memory import NoSpans


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


def _size(_: Any, number: int) -> int:
    return number
