"""The Dask cluster that forward passes are evaluated on: a client of it, for as long as a block lasts."""

import asyncio
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from uuid import uuid4

import dask
from distributed import Client, LocalCluster, Security
from distributed.comm import connect as dask_connect
from distributed.utils import silence_logging_cmgr

from configs.clusters import CudaWorkers, RunningScheduler
from configs.schema import ClusterConfig
from deepzero_core.errors import RequestError, WorkError
from infra.dask_settings import SETTINGS
from infra.home import home
from infra.launch import launched
from infra.own_code import own_code
from infra.plugins import clear_left_over
from infra.specs import ADDRESS, cluster_spec
from infra.transport_security import security_of

_LOOPBACK = re.compile(r"\w+://(127\.|localhost[:/]|\[::1\])")


@contextmanager
def open_cluster(settings: ClusterConfig, *, mentions: Any = None) -> Iterator[Client]:
    """A client of the cluster that the section `cluster` of a configuration describes, with the workers it asks for.

    mentions: plain data; the packages of every "package.module:callable" in it are made importable on workers that
    have not been started from this process (see `infra.own_code`).

    Raises:
        RequestError: the description is wrong, a library or a certificate is missing, or nobody answers at the address.
        WorkError: the cluster cannot be started, or fewer workers than asked for within the time-out.
    """
    spec, workers, timeout_s = cluster_spec(settings), settings.workers, settings.timeout_s
    with dask.config.set(SETTINGS):
        if isinstance(spec, RunningScheduler):
            assert spec.address is not None
            own = bool(settings.address or settings.spec)
            key = "cluster.address" if own else ADDRESS
            with _client_of(spec.address, _security(spec), timeout_s, key) as client:
                # A configuration that names no scheduler does not know how many workers this one has.
                _wait(client, max(1, workers) if own else 1, timeout_s)
                clear_left_over(client)
                with own_code(client, mentions):
                    yield client
            return
        if isinstance(spec, CudaWorkers) and spec.devices:
            workers = len(spec.devices)
        with launched(spec, workers, timeout_s) as cluster, Client(cluster, timeout=timeout_s) as client:
            _wait(client, workers, timeout_s)
            with own_code(client, None if isinstance(cluster, LocalCluster) else mentions):
                yield client


def shares_disk(client: Client) -> bool:
    """Whether paths mean the same to all workers there are: processes that this one has started, or of this machine.

    Workers of a scheduler on loopback are asked what stands in a file.
    """
    if isinstance(client.cluster, LocalCluster):
        return True
    if not _LOOPBACK.match(client.scheduler.address):
        return False
    folder, token = home(), uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=folder, prefix="seen-", encoding="ascii") as file:
        file.write(token)
        file.flush()
        found = client.run(_content, file.name).values()
    return bool(found) and all(content == token for content in found)


def _content(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None


@contextmanager
def connect(workers: int, address: str | None, timeout_s: float) -> Iterator[Client]:
    """A client of `workers` local worker processes on loopback, or of the scheduler at `address`."""
    local = {"spec": "local"} if address is None else {"address": address}
    with open_cluster(ClusterConfig(workers=workers, timeout_s=timeout_s, **local)) as client:
        yield client


def _security(spec: RunningScheduler) -> Security | None:
    assert spec.address is not None
    if not spec.address.startswith(("tls://", "wss://")):
        return None
    return security_of(spec.tls, what=f"the Dask scheduler at {spec.address}")


@contextmanager
def _client_of(address: str, security: Security | None, timeout_s: float, key: str) -> Iterator[Client]:
    """A client of a running scheduler; `key` names where its address was set."""
    try:
        asyncio.run(_greet(address, security, timeout_s))
        client = Client(address, timeout=timeout_s, security=security)
    except (OSError, TimeoutError, ValueError) as error:
        raise RequestError(
            f"no Dask scheduler answers at {key}={address!r} within {timeout_s:g} s; "
            "start one with `dask scheduler`, or leave the address out for local workers"
        ) from error
    # Of a scheduler that is lost Dask logs every attempt to reach it, tracebacks included; we say it once.
    with silence_logging_cmgr(logging.CRITICAL), client:
        yield client


async def _greet(address: str, security: Security | None, timeout_s: float) -> None:
    """Shake hands once: the client would wait for ever where somebody listens and says nothing."""
    arguments = {} if security is None else security.get_connection_args("client")
    async with asyncio.timeout(timeout_s):
        comm = await dask_connect(address, timeout=timeout_s, **arguments)
        await comm.close()


def _wait(client: Client, workers: int, timeout_s: float) -> None:
    try:
        client.wait_for_workers(workers, timeout=timeout_s)
    except TimeoutError as error:
        present = len(client.nthreads())
        raise WorkError(f"{present} of {workers} Dask workers came within {timeout_s:g} s") from error
