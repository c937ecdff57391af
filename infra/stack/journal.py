"""The logs of the services: their last lines, and what comes."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

_POLL_S = 0.3


def last(files: Mapping[str, Path], lines: int) -> Iterator[tuple[str, str]]:
    """(name, line) of the last `lines` lines of each file, file after file."""
    for name, file in files.items():
        try:
            with file.open(encoding="utf-8", errors="replace") as text:
                yield from ((name, line.rstrip("\n")) for line in deque(text, maxlen=lines))
        except FileNotFoundError:
            continue


def follow(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """(name, line) of every whole line written from now on, without end; also after a file has been rotated."""
    tails = [Tail(name, file) for name, file in files.items()]
    while True:
        fresh = [(tail.name, line) for tail in tails for line in tail.fresh()]
        yield from fresh
        if not fresh:
            time.sleep(_POLL_S)


class Tail:
    """One file and how much of it has been read."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file = name, file
        self.identity, self.position = self._look()
        self.partial = b""

    def fresh(self) -> list[str]:
        identity, size = self._look()
        if identity != self.identity or size < self.position:
            self.identity, self.position, self.partial = identity, 0, b""
        if size == self.position:
            return []
        with self.file.open("rb") as stream:
            stream.seek(self.position)
            read = stream.read()
        self.position += len(read)
        *whole, self.partial = (self.partial + read).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]

    def _look(self) -> tuple[int, int]:
        try:
            status = self.file.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_size
