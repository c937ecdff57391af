"""The Dask cluster that forward passes are evaluated on: local processes, or a scheduler that runs already."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import dask
from distributed import Client, LocalCluster
from distributed.comm import connect as dask_connect

from deepzero_core.errors import RequestError, WorkError
from infra.dask_settings import SETTINGS

log = logging.getLogger(__name__)


@contextmanager
def connect(workers: int, address: str | None, timeout_s: float) -> Iterator[Client]:
    """A client of `workers` local worker processes on loopback, or of the scheduler at `address`.

    Raises:
        RequestError: nobody answers at the address.
        WorkError: fewer workers than asked for within the time-out.
    """
    with dask.config.set(SETTINGS):
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
