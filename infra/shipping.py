"""Files for workers that share no disk with this process: by content, in blocks that Dask keeps, checked on arrival.

here       `Shipment` cuts a file into blocks, each the result of a small task; Dask keeps them on workers, gives
           them from worker to worker, and makes a lost one again
a worker   `received` fetches the blocks when it first needs the file, holds their sha256 against the parcel's, and
           keeps the file in a folder beside its own that all workers of the host share, also for later runs
"""

import hashlib
import io
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
from distributed import Client, Future, Reschedule, get_client, get_worker

from deepzero_core.errors import RequestError, WorkError

BLOCK = 4 << 20
_PATIENCE_S = 10.0
_CHECKED: set[Path] = set()
_TURN = threading.Lock()


@dataclass(frozen=True)
class Parcel:
    """A file by its content: sha256, bytes, and the keys of the tasks that give its blocks."""

    digest: str
    size: int
    blocks: tuple[str, ...]


class Shipment:
    """Parcels on a cluster, until the block ends."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._name = uuid4().hex
        self._held: list[Future] = []

    def __enter__(self) -> "Shipment":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()

    def file(self, path: Path) -> Parcel:
        """RequestError: it cannot be read."""
        try:
            return self.content(path.read_bytes())
        except OSError as error:
            raise RequestError(f"{path} cannot be read to be sent to workers: {error.strerror or error}") from None

    def array(self, values: np.ndarray) -> Parcel:
        """As a file in NumPy's format."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
        return self.content(buffer.getbuffer())

    def content(self, data: bytes | memoryview) -> Parcel:
        view, keys = memoryview(data), []
        for start in range(0, max(len(view), 1), BLOCK):
            key = f"deepzero-parcel-{self._name}-{len(self._held)}"
            self._held.append(self._client.submit(_hold, bytes(view[start : start + BLOCK]), key=key, pure=False))
            keys.append(key)
        return Parcel(hashlib.sha256(view).hexdigest(), len(view), tuple(keys))


def received(parcel: Parcel) -> Path:
    """The file on this worker's disk, fetched where it is not there already. To be called in a task.

    Raises:
        Reschedule: a block is not to be had for a while; the worker may have to make it again itself.
        WorkError: the blocks are not what was sent; the disk failed.
    """
    folder = Path(get_worker().local_directory).parent / "deepzero-files"
    path = folder / parcel.digest
    with _TURN:
        if path not in _CHECKED and not _is(path, parcel):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _fetch(parcel, path)
            except OSError as error:
                raise WorkError(f"a worker cannot keep a file that it was sent in {folder}: {error}") from error
        _CHECKED.add(path)
    return path


def _fetch(parcel: Parcel, path: Path) -> None:
    digest, client = hashlib.sha256(), get_client()
    handle, staging = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for key in parcel.blocks:
                block = _block(client, key)
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != parcel.digest:
            raise WorkError("a file that was sent to a worker has arrived with other content")
        Path(staging).replace(path)
    finally:
        Path(staging).unlink(missing_ok=True)


def _block(client: Client, key: str) -> bytes:
    future = Future(key, client)
    # Dask tells a client of the keys that it has asked for, and has no public way to ask for one by name.
    client._send_to_scheduler({"op": "client-desires-keys", "keys": [key]})
    try:
        block: bytes = future.result(timeout=_PATIENCE_S)
        return block
    except TimeoutError:
        # Who held it may be lost, and this worker's one thread the only one that can make it again.
        raise Reschedule from None


def _is(path: Path, parcel: Parcel) -> bool:
    """Whether the file is there and is what it should be: it may be of an earlier run, cut short or damaged."""
    try:
        if path.stat().st_size != parcel.size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == parcel.digest
    except OSError:
        return False


def _hold(block: bytes) -> bytes:
    return block
