"""The Dask cluster that forward passes are evaluated on: local processes, or a scheduler that runs already."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import dask
from distributed import Client, LocalCluster
from distributed.comm import connect as dask_connect

from deepzero_core.errors import RequestError, WorkError

log = logging.getLogger(__name__)

_SETTINGS = {
    # A range is retried on another worker when its own dies; a range that keeps killing workers ends the run.
    "distributed.scheduler.allowed-failures": 5,
    # One range at a time and one thread each: the same bits on every worker.
    "distributed.worker.multiprocessing-method": "spawn",
    # Idle workers pull ranges from busy ones; θ is small, so that a pull is cheap.
    "distributed.scheduler.work-stealing": True,
    # What stops this process is not for its workers.
    "distributed.worker.preload": ["infra.dask_preload"],
    # Every core computes: no sampling of stacks every 10 ms, no look at the event loop every 20 ms.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
}


@contextmanager
def connect(workers: int, address: str | None, timeout_s: float) -> Iterator[Client]:
    """A client of `workers` local worker processes on loopback, or of the scheduler at `address`.

    Raises:
        RequestError: nobody answers at the address.
        WorkError: fewer workers than asked for within the time-out.
    """
    with dask.config.set(_SETTINGS):
        if address is not None:
            try:
                asyncio.run(_greet(address, timeout_s))
                client = Client(address, timeout=timeout_s)
            except (OSError, TimeoutError, ValueError) as error:
                raise RequestError(
                    f"no Dask scheduler answers at cluster.address={address!r} within {timeout_s:g} s; "
                    "start one with `dask scheduler`, or leave the address out for local workers"
                ) from error
            with client:
                _wait(client, max(1, workers), timeout_s)
                yield client
            return
        with (
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",  # without one, Dask takes port 8787, and warns where it is taken
                memory_limit=0,
                silence_logs=logging.CRITICAL,  # what matters of a lost worker reaches the client and is told once
            ) as cluster,
            Client(cluster, timeout=timeout_s) as client,
        ):
            _wait(client, workers, timeout_s)
            yield client


async def _greet(address: str, timeout_s: float) -> None:
    """Shake hands once: the client would wait for ever where somebody listens and says nothing."""
    async with asyncio.timeout(timeout_s):
        comm = await dask_connect(address, timeout=timeout_s)
        await comm.close()


def _wait(client: Client, workers: int, timeout_s: float) -> None:
    try:
        client.wait_for_workers(workers, timeout=timeout_s)
    except TimeoutError as error:
        present = len(client.scheduler_info(n_workers=-1)["workers"])
        raise WorkError(f"{present} of {workers} Dask workers came within {timeout_s:g} s") from error
