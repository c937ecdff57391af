"""How Dask is to behave wherever it evaluates for us: in processes of our own and in the stack's."""

from typing import Any

SETTINGS: dict[str, Any] = {
    # A range is retried on another worker when its own dies; a range that keeps killing workers ends the run.
    "distributed.scheduler.allowed-failures": 5,
    # One range at a time and one thread each: the same bits on every worker.
    "distributed.worker.multiprocessing-method": "spawn",
    # Idle workers pull ranges from busy ones; θ is small, so that a pull is cheap.
    "distributed.scheduler.work-stealing": True,
    # What a step reads again stays where it is: no dropping of copies every two seconds, to be fetched for the next.
    "distributed.scheduler.active-memory-manager.start": False,
    # What stops this process is not for its workers.
    "distributed.worker.preload": ["infra.dask_preload"],
    "distributed.scheduler.preload": ["infra.dask_memory"],
    # Every core computes: no sampling of stacks every 10 ms, no look at the event loop every 20 ms or at disk and
    # network every 500 ms.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    # Dask keeps its last messages, and with each of them θ: of a large network a thousand would fill the memory.
    "distributed.admin.low-level-log-length": 10,
    "distributed.admin.log-length": 1000,
    "distributed.admin.system-monitor.log-length": 600,
}
