"""Loaded by every Dask scheduler that is started here: it forgets the steps that are over.

Dask keeps a span of every submission for as long as the scheduler lives, with its groups of tasks: 10 kB a step, which
would fill the memory of a run of weeks and are read by nobody.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from distributed import Scheduler
from distributed.spans import SpansSchedulerExtension


class NoSpans(SpansSchedulerExtension):
    """Workers report to it, and tasks are shown to it; it keeps nothing."""

    def observe_tasks(self, tss: Iterable[Any], code: Any, span_metadata: Any) -> dict[Any, dict[Any, Any]]:
        return {}

    def heartbeat(self, ws: Any, data: Mapping[Any, float]) -> None:
        return


async def dask_setup(scheduler: Scheduler) -> None:
    scheduler.extensions["spans"] = NoSpans(scheduler)
