"""Waiting for tasks on Dask workers, and word of workers that come and go."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from distributed import Client, Future
from distributed import wait as wait_for

from deepzero_core.errors import WorkError


def finished(client: Client, futures: Sequence[Future], timeout_s: float, *, every: bool = False) -> list[Future]:
    """Some that have ended, or `every` one. A task may take as long as it takes; workers have to be there.

    ConnectionError: the client has lost its scheduler. WorkError: no worker for longer than `timeout_s`.
    """
    alone = None
    while True:
        try:
            when = "ALL_COMPLETED" if every else "FIRST_COMPLETED"
            return list(wait_for(futures, timeout=min(5.0, timeout_s), return_when=when).done)
        except TimeoutError:
            if client.status != "running":
                raise ConnectionError(f"the Dask client is {client.status}") from None
            if client.nthreads():  # not `scheduler_info`, which the client renews every two seconds without workers
                alone = None
                continue
            alone = alone or time.monotonic()
            if time.monotonic() - alone > timeout_s:
                raise WorkError(f"there has been no Dask worker for {timeout_s:g} s") from None


def log_workers(client: Client, log: logging.Logger, again: str) -> None:
    """Log who joins and who is lost, until the topic "all" is unsubscribed. again: what becomes of their tasks."""

    def report(event: tuple[float, Any]) -> None:
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            log.warning("Dask worker %s was lost: %s", message.get("worker"), again)
        if isinstance(message, dict) and message.get("action") == "add-worker":
            log.info("Dask worker %s joined", message.get("worker"))

    client.subscribe_topic("all", report)
