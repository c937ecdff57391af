"""Loaded by every local Dask worker process as it starts.

A run is stopped by a signal to its whole process group: a terminal does that, a supervisor, and Prefect's worker when
a flow run is cancelled. Whoever leads the run then ends its workers, in order. Workers that went by themselves at the
same moment would be lost workers to it, and it would wait for what they never say. Workers without a nanny, as those of
`deepzero up`, have nobody but the signal to end them.
"""

import signal

from distributed import Worker


async def dask_setup(worker: Worker) -> None:
    if worker.nanny is None:
        return
    for stopped_with in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopped_with, signal.SIG_IGN)
