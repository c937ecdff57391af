"""Output that nobody reads any more must not end a run.

A Prefect worker reads what its flow runs print, through a pipe. When the worker dies, the next line would end them:
`print` raises, and Rich, with which Prefect logs, raises `SystemExit`, which in Dask's thread closes the loop that
every answer comes through.
"""

import logging
import os
import sys
from typing import IO

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console


def say(line: str, stream: IO[str] | None = None) -> None:
    """Print a line on a stream, by default stdout, if anybody reads it."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        _discard(stream)


def outlive_readers() -> None:
    """From here on Prefect's log lines on the console are written like that; its server gets them all the same."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.console.__class__ = _Patient


class _Patient(Console):
    def on_broken_pipe(self) -> None:
        _discard(self.file)


def _discard(stream: IO[str]) -> None:
    """Nothing goes to that stream any more, not even what it still holds when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
