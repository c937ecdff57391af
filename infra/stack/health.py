"""Whether the services of a stack are well: each is asked what it offers for that purpose."""

from dataclasses import dataclass

import httpx

from infra.stack import services, supervision
from infra.stack.state import Stack

_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Row:
    """One service as `deepzero status` shows it.

    state: the supervisor's word for its process. pid: None where there is none. uptime_s: seconds since its start.
    """

    service: str
    state: str
    pid: int | None
    uptime_s: float | None
    address: str
    healthy: bool


def examine(stack: Stack) -> list[Row]:
    """Every service, in the order in which they are started.

    Raises:
        WorkError: the supervisor does not answer.
    """
    processes = supervision.processes(stack)
    return [_row(stack, service.name, processes.get(service.name)) for service in services.services(stack)]


def answers(url: str | None, auth: tuple[str, str] | None = None) -> bool:
    """Whether a GET of this address is answered with success, soon. auth: user and password."""
    if url is None:
        return False
    try:
        # No proxy stands between this machine and itself.
        return httpx.get(url, auth=auth, timeout=_TIMEOUT_S, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _row(stack: Stack, service: str, process: supervision.Process | None) -> Row:
    if process is None:
        return Row(service, "unknown", None, None, "", False)
    url = services.health_url(stack, service)
    well = answers(url) if url else services.is_connected(process.pid, stack.ports["dask"])
    healthy = process.pid != 0 and well
    return Row(
        service,
        process.state,
        process.pid or None,
        process.uptime_s if process.pid else None,
        services.address_of(stack, service),
        healthy,
    )
