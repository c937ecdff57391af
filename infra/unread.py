"""Output that nobody reads any more must not end a run.

A Prefect worker reads what its flow runs print, through a pipe. When the worker dies, the next line would end them:
`print` raises, in our lines and in those of MLflow, where it looks as if the store were away; and Rich, with which
Prefect logs, raises `SystemExit`, which in Dask's thread closes the loop that every answer comes through.
"""

import io
import logging
import os
import sys
from typing import Any, TextIO

from prefect.logging.handlers import PrefectConsoleHandler


def outlive_readers() -> None:
    """From here on stdout and stderr drop what nobody reads; Prefect's server gets its log lines all the same.

    Streams that somebody has put in the place of the interpreter's own are left alone.
    """
    for name in ("stdout", "stderr"):
        own: TextIO | None = getattr(sys, name)
        if own is None or own is not getattr(sys, f"__{name}__"):
            continue
        patient = _patient(own)
        setattr(sys, name, patient)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, PrefectConsoleHandler) and handler.console.file is own:
                handler.console.file = patient


class _Descriptor(io.FileIO):
    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def _patient(stream: TextIO) -> TextIO:
    stream.flush()
    descriptor = _Descriptor(stream.fileno(), "w", closefd=False)
    unbuffered = isinstance(stream, io.TextIOWrapper) and (stream.line_buffering or stream.write_through)
    return io.TextIOWrapper(io.BufferedWriter(descriptor), stream.encoding, stream.errors, line_buffering=unbuffered)
