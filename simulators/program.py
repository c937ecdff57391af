"""A program in a process group of its own: started without a shell, watched, killed with all that it started."""

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from deepzero_core.errors import RequestError
from simulators.wire import LONGEST_LINE

_CHUNK = 1 << 16
_PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL", "SYSTEMROOT")


class ProgramFailedError(Exception):
    """The program crashed, hung or talked nonsense; one sentence."""


def start(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], errors: IO[bytes], *, pipes: bool
) -> subprocess.Popen[bytes]:
    """The program, in `folder`, with a few variables of this process and those of `environment`.

    Raises:
        RequestError: there is no such program, or it may not be run.
    """
    few = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    stream = subprocess.PIPE if pipes else subprocess.DEVNULL
    try:
        return subprocess.Popen(
            list(command),
            stdin=stream,
            stdout=stream,
            stderr=errors,
            cwd=folder,
            env=few | dict(environment),
            start_new_session=True,
            bufsize=0,
        )
    except OSError as error:
        raise RequestError(f"the program {command[0]!r} cannot be started: {error.strerror}") from error


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and all that it started. It may have ended long ago."""
    # Suppressed: it has ended by itself, and so have its children. A group keeps its number while it has a member.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def end_of(process: subprocess.Popen[bytes], errors: IO[bytes]) -> str:
    """How it ended, in words, with the last line that it wrote on its error stream."""
    code = process.poll()
    if code is None:
        how = "it closed its output"
    elif code < 0:
        how = f"it was ended by {signal.Signals(-code).name}"
    else:
        how = f"it ended with exit status {code}"
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - LONGEST_LINE))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return f"{how}: {lines[-1][:200]}" if lines else how


class Conversation:
    """A running program that is asked again and again through its pipes. See `simulators.wire`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="deepzero-program-"))
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._process = start(command, Path(folder), environment, self._errors, pipes=True)
            stack.callback(stop, self._process)
            # Also when this process ends: whatever it has started goes first.
            self._release = weakref.finalize(self, stack.pop_all().close)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._buffer = bytearray()
        self._deadline = 0.0

    def close(self) -> None:
        """Kill the program and remove its folder."""
        self._release()

    def say(self, message: bytes, timeout: float) -> None:
        """Send a question; `timeout` seconds from now its whole answer must have been read.

        Raises:
            ProgramFailedError: the program ended or does not take it in time. So do `line` and `bytes`.
        """
        self._deadline = time.monotonic() + timeout
        if self._buffer:
            raise ProgramFailedError("it answered more than it was asked for")
        left = memoryview(message)
        with selectors.DefaultSelector() as selector:
            selector.register(self._in, selectors.EVENT_WRITE)
            # It may begin to answer before it has read everything: a full pipe must not stop both.
            selector.register(self._out, selectors.EVENT_READ)
            while left:
                for key, _ in self._ready(selector):
                    if key.fd == self._out:
                        self._read()
                        continue
                    try:
                        left = left[os.write(self._in, left[:_CHUNK]) :]
                    except BrokenPipeError as error:
                        raise ProgramFailedError(self._end()) from error

    def line(self) -> str:
        while (end := self._buffer.find(b"\n", 0, LONGEST_LINE)) < 0:
            if len(self._buffer) >= LONGEST_LINE:
                raise ProgramFailedError(f"it answered a line of more than {LONGEST_LINE} bytes")
            self._wait_and_read()
        return self.bytes(end + 1)[:-1].decode(errors="replace")

    def bytes(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._wait_and_read()
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _wait_and_read(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            self._ready(selector)
            self._read()

    def _ready(self, selector: selectors.BaseSelector) -> list[tuple[selectors.SelectorKey, int]]:
        ready = selector.select(max(0.0, self._deadline - time.monotonic()))
        if not ready:
            raise ProgramFailedError("it did not answer in time")
        return ready

    def _read(self) -> None:
        try:
            some = os.read(self._out, _CHUNK)
        except BlockingIOError:
            return
        if not some:
            raise ProgramFailedError(self._end())
        self._buffer += some

    def _end(self) -> str:
        # Suppressed: it closed a pipe and lives on. It is killed when the conversation is closed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        return end_of(self._process, self._errors)
