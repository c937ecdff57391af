"""Files that appear completely or not at all: hashing, durable writing, staged folders."""

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from deepzero_core.durable import sync_folder
from deepzero_core.errors import RequestError, WorkError

# A staging folder untouched for this long belongs to a process that was killed.
_ABANDONED_AFTER_S = 24 * 3600
_INSTALL_ATTEMPTS = 20


def sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    """Write one record batch as an Arrow IPC file and wait until the disk has it."""
    with path.open("wb") as stream:
        with pa.ipc.new_file(stream, batch.schema) as writer:
            writer.write_batch(batch)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` (a rename within one file system is atomic), removed at the end if still there.

    Raises:
        RequestError: the place cannot be written to.
        WorkError: the disk failed or is full while the block ran.
    """
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, f".{target.name}.")
        # Not mkdtemp: the folder becomes the store, which gets the permissions of any new folder.
        staging = parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
        staging.mkdir()
    except OSError as error:
        raise RequestError(f"data store {target} cannot be written: {error.strerror} ({error.filename})") from None
    try:
        yield staging
    except OSError as error:
        raise WorkError(f"writing data store {target} failed: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def install(staging: Path, target: Path, *, keep: Callable[[], bool], known: set[str]) -> bool:
    """Move `staging` to `target`; returns False where `keep()` says that what is there already is as good.

    Several processes may do this at once: a rename onto a folder that is not empty fails, so whoever comes second sees
    the first one's work and asks `keep()` again.

    Args:
        staging: complete folder beside `target`.
        target: where it shall appear.
        keep: whether `target` already holds the same content, intact.
        known: names of the files that a store consists of; a folder holding anything else is not replaced.

    Raises:
        RequestError: something other than a store is in the way.
        WorkError: other processes kept replacing `target`.
    """
    for _ in range(_INSTALL_ATTEMPTS):
        if target.exists() and keep():
            return False
        _refuse_foreign(target, known)
        retired = Path(f"{staging}.old.tmp")
        # FileNotFoundError: nothing there, or another process has just moved it aside.
        with contextlib.suppress(FileNotFoundError):
            target.rename(retired)
        try:
            staging.rename(target)
        except OSError:
            if not target.exists():
                with contextlib.suppress(OSError):
                    retired.rename(target)
                raise
            continue
        finally:
            shutil.rmtree(retired, ignore_errors=True)
        sync_folder(target.parent)
        return True
    raise WorkError(f"data store {target} kept being replaced by other processes; run one of them at a time")


def _refuse_foreign(target: Path, known: set[str]) -> None:
    try:
        foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in known)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RequestError(f"{target} is in the way of a data store ({error.strerror}); choose another place") from None
    if foreign:
        raise RequestError(f"{target} is not a data store, it holds {foreign[0]!r}; move it or choose another place")


def _sweep(parent: Path, prefix: str) -> None:
    """Remove what killed processes left behind."""
    for entry in parent.iterdir():
        if entry.name.startswith(prefix) and entry.name.endswith(".tmp"):
            # Another process may sweep at the same time, or finish with the folder.
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _ABANDONED_AFTER_S:
                    shutil.rmtree(entry, ignore_errors=True)
