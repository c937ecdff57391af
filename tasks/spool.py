"""What a run has to tell MLflow, on disk until MLflow has it: one file per run, appended to and never changed.

file:  `$DEEPZERO_HOME/spool/ID.jsonl`, beside it `ID.files/` with copies of the artifacts that wait, and `ID.lock`,
       held by the process that writes
line:  CRC-32 of the rest as 8 hexadecimal digits, a space, one JSON object
       first {"kind": "run", "run_id", "store", "began"}; then entries, which `tasks.delivery` describes

A line is one write: a process that is killed leaves whole lines, at worst a last one cut short. Lines whose sum is
wrong are left out, counted and never taken for something else.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deepzero_core.errors import WorkError

_SUFFIX = ".jsonl"


class SpoolInUseError(Exception):
    """Another process writes this spool, or has just done with it."""


@dataclass(frozen=True)
class Line:
    """One line of a spool. entry: None where the line is damaged; end: offset of the next line, in bytes."""

    entry: dict[str, Any] | None
    end: int


class Spool:
    """One spool file, held by this process until it is closed."""

    def __init__(self, path: Path, head: Mapping[str, Any] | None = None) -> None:
        """Open the spool at `path`; `head`: the first line of a new one.

        Raises:
            SpoolInUseError: another process holds it, or has removed it.
            WorkError: the disk does not take it.
        """
        self.path = path
        self._lock = FileLock(path.with_suffix(".lock"), timeout=0, thread_local=False)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise SpoolInUseError(str(path)) from None
            if not path.exists():
                if head is None:  # whoever wrote it has delivered it since it was seen
                    self._let_go()
                    raise SpoolInUseError(str(path))
                _replace(path, head)
        self._start = next((line.end for line in self.read()), 0)

    @property
    def files(self) -> Path:
        """The folder of the artifacts that wait."""
        return self.path.with_suffix(".files")

    @property
    def head(self) -> dict[str, Any]:
        """The first line; empty where it is damaged."""
        line = next(self.read(), None)
        return line.entry if line is not None and line.entry is not None else {}

    @property
    def start(self) -> int:
        """Where the entries begin, in bytes."""
        return self._start

    @property
    def empty(self) -> bool:
        return self.path.stat().st_size <= self._start

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line. WorkError when the disk does not take it; the file is then as it was."""
        line, size = _line(entry), self.path.stat().st_size
        with _writing(self.path):
            try:
                with self.path.open("ab", buffering=0) as file:
                    rest = memoryview(line)
                    while rest:  # a disk that is nearly full takes a part, and says at the next attempt what is wrong
                        rest = rest[file.write(rest) :]
            except OSError:
                os.truncate(self.path, size)
                raise

    def keep(self, source: Path) -> Path:
        """Copy a file or folder to where it stays until it is delivered; its place there."""
        with _writing(self.path):
            self.files.mkdir(exist_ok=True)
            place = self.files / f"{len(list(self.files.iterdir())):06d}" / source.name
            if source.is_dir():
                shutil.copytree(source, place)
            else:
                place.parent.mkdir()
                shutil.copyfile(source, place)
        return place

    def read(self, offset: int = 0) -> Iterator[Line]:
        """The lines from `offset`, in bytes, on; a last one that was cut short is left out."""
        with self.path.open("rb") as file:
            file.seek(offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                offset += len(text)
                yield Line(_parsed(text), offset)

    def sync(self) -> None:
        """Make everything so far survive a loss of power as well."""
        with _writing(self.path), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def clear(self, head: Mapping[str, Any]) -> None:
        """Everything has been delivered: begin again with this first line."""
        with _writing(self.path):
            _replace(self.path, head)
            shutil.rmtree(self.files, ignore_errors=True)
        self._start = self.path.stat().st_size

    def close(self) -> None:
        """Let go of the file, and remove it where nothing waits in it."""
        done = self.empty
        if done:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.files, ignore_errors=True)
            self._let_go()
        else:
            self._lock.release()

    def _let_go(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def waiting(base: Path) -> list[Path]:
    """The spools below the state folder `base`, oldest first."""
    return sorted((base / "spool").glob(f"*{_SUFFIX}"), key=_age)


def _age(path: Path) -> tuple[float, str]:
    try:
        return path.stat().st_mtime, path.name
    except FileNotFoundError:  # delivered since it was seen
        return 0.0, path.name


def place(base: Path, run_id: str) -> Path:
    """Where the spool of a run lies."""
    return base / "spool" / f"{run_id}{_SUFFIX}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """OSErrors as a sentence that names the spool."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WorkError(f"what MLflow has yet to be told cannot be kept in {path}: {reason}") from error


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> dict[str, Any] | None:
    check, _, text = line.rstrip(b"\n").partition(b" ")
    try:
        if len(check) != 8 or int(check, 16) != zlib.crc32(text):
            return None
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _replace(path: Path, head: Mapping[str, Any]) -> None:
    """A file with this first line alone takes the place of `path`, at once."""
    beside = path.with_suffix(".part")
    beside.write_bytes(_line(head))
    beside.replace(path)
