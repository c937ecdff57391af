"""Worker plugins: what a run leaves on the workers for its time.

The plugins of a scheduler die with it. Where a supervisor starts another one at once, client and workers connect to
that, and it takes tasks for plugins that none of its workers has.

A run that is killed takes nothing away: its network, its data and its code would stay in the workers of a scheduler
that lives on. Names tell whose plugins are, and who connects to that scheduler next takes off those whose client has
gone.
"""

from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any, TypeVar
from uuid import uuid4

from distributed import CancelledError, Client

T = TypeVar("T")

_OURS = "deepzero-"


class Absent(Enum):
    """What a task answers on a worker that does not have its plugin.

    It is no error, which the worker would log: most often the run was stopped and nobody reads it.
    """

    PLUGIN = "plugin"


def present(answer: T | Absent) -> T:
    """The answer. ConnectionError where the plugin was absent: somebody reads it, so the scheduler is another one."""
    if isinstance(answer, Absent):
        raise ConnectionError("the scheduler was started anew, and its workers know nothing of this run")
    return answer


def name_for(client: Client, kind: str) -> str:
    """The name of a new plugin of this client."""
    return f"{_OURS}{kind}-{client.id}-{uuid4().hex}"


def clear_left_over(client: Client) -> None:
    """Take our plugins off the workers whose client has gone."""
    for name in client.run_on_scheduler(_left_over()):
        withdraw(client, name)


def _left_over() -> Callable[..., list[str]]:
    """For the scheduler, which need not have this package: a function within a function travels by its code."""
    ours = _OURS

    def names(dask_scheduler: Any) -> list[str]:
        """Of our plugins whose client is not connected."""
        found, clients = dask_scheduler.worker_plugins, dask_scheduler.clients
        return [name for name in found if name.startswith(ours) and not any(client in name for client in clients)]

    return names


def withdraw(client: Client, plugin: str, topic: str | None = None) -> None:
    """Take a plugin off the workers, and stop listening to a topic. Nothing where its scheduler is gone."""
    if client.status != "running":
        return
    with suppress(CancelledError, OSError, TimeoutError, ValueError):  # the last from a scheduler that never had it
        if topic is not None:
            client.unsubscribe_topic(topic)
        client.unregister_worker_plugin(plugin)
