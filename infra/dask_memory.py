"""Loaded by every Dask scheduler that is started here: it forgets the steps that are over.

Dask keeps a span of every submission for as long as the scheduler lives, with its groups of tasks: 10 kB a step, which
would fill the memory of a run of weeks and are read by nobody. And every process of it keeps the last 100,000 names of
tasks beside their kinds, all different and none seen again: 30 MB.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dask.utils import key_split
from distributed import Scheduler
from distributed.spans import SpansSchedulerExtension

_NAMES = 1000


def forget_names() -> None:
    """Let go what Dask has noted of the names of tasks, once it is much."""
    if key_split.cache_info().currsize > _NAMES:
        key_split.cache_clear()


class NoSpans(SpansSchedulerExtension):
    """Workers report to it, and tasks are shown to it; it keeps nothing."""

    def observe_tasks(self, tss: Iterable[Any], code: Any, span_metadata: Any) -> dict[Any, dict[Any, Any]]:
        forget_names()
        return {}

    def heartbeat(self, ws: Any, data: Mapping[Any, float]) -> None:
        return


async def dask_setup(scheduler: Scheduler) -> None:
    scheduler.extensions["spans"] = NoSpans(scheduler)
