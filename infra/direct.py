"""A worker asked directly: with one worker and one thing to do, Dask's scheduler has nothing to schedule.

A task passes through the scheduler four times, with its graph, its state and its result. A question goes to the worker,
and its answer comes back. It is answered in the thread that tasks have: the two never compute at once.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from distributed import Client, Worker
from distributed.core import send_recv

from infra.packed import packed, unpacked

_LEFT_S = 2e-3
_CONNECTED_S = 10.0


def teach(worker: Worker, question: str, answer: Callable[..., Any], afterwards: Callable[[], object]) -> None:
    """Have a worker answer a question by `answer(*arguments)`, and do something when the answer has left."""
    thread = worker.executors["default"]

    async def handler(arguments: bytes) -> dict[str, bytes]:
        found = await worker.loop.run_in_executor(thread, lambda: packed(answer(*unpacked(arguments))))
        worker.loop.call_later(_LEFT_S, thread.submit, afterwards)
        return {"found": found}

    worker.handlers[question] = handler


def unteach(worker: Worker, question: str) -> None:
    worker.handlers.pop(question, None)


def ask(client: Client, address: str, question: str, *arguments: Any) -> "Future[Any]":
    """The future of the answer, None of a worker that was not taught it.

    It raises what the worker raised, and OSError where that is lost or cannot be reached.
    """

    async def asked() -> Any:
        comm = await client.rpc.connect(address, timeout=_CONNECTED_S)
        try:
            answer = await send_recv(comm, op=question, arguments=packed(arguments))
        finally:
            client.rpc.reuse(address, comm)
        return None if answer is None else unpacked(answer["found"])

    return asyncio.run_coroutine_threadsafe(asked(), client.loop.asyncio_loop)
