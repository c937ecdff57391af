"""Worker plugins: what a run leaves on the workers for its time.

The plugins of a scheduler die with it. Where a supervisor starts another one at once, client and workers connect to
that, and it takes tasks for plugins that none of its workers has.
"""

from contextlib import suppress
from enum import Enum
from typing import TypeVar

from distributed import CancelledError, Client

T = TypeVar("T")


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


def withdraw(client: Client, plugin: str, topic: str | None = None) -> None:
    """Take a plugin off the workers, and stop listening to a topic. Nothing where its scheduler is gone."""
    if client.status != "running":
        return
    with suppress(CancelledError, OSError, TimeoutError, ValueError):  # the last from a scheduler that never had it
        if topic is not None:
            client.unsubscribe_topic(topic)
        client.unregister_worker_plugin(plugin)
