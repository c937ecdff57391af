"""Answers that were paid for, kept by the content of the question.

key:   BLAKE2b of the box's identity and of one example's type, shape and bytes
value: one row [K], its bytes in float32 or float64 and a check sum of them

An answer is taken to depend on its own example alone, and to be the same every time. Of a network computed in floats
that is true but for the last bits, which may depend on what else is in the batch; a box that answers at random, or
that has been replaced by another behind the same address, must not be cached (or be given a new `version`).
"""

import hashlib
import sqlite3
from collections.abc import Collection, Mapping
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from deepzero_core.oracle.database import Database

_SCHEMA = ("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",)
_TYPES = {b"f": "<f4", b"d": "<f8"}
_AT_ONCE = 500
_SUM_BYTES = 8


class ResponseCache:
    """Answers in a SQLite file: of any number of boxes, shared by any number of processes.

    A damaged file is set aside with a warning and begun anew; a damaged row counts as not there.

    Args:
        path: the file, made where it is not there; on a disk of this machine.

    Raises:
        RequestError: a place that cannot be written to, or a file of something else.
        WorkError: the disk failed or is full.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._database = Database(
            path, schema=_SCHEMA, application_id=0x447A4361, what="response cache", replaceable=True
        )
        self._database.run(lambda connection: None)

    def get(self, keys: Collection[bytes]) -> dict[bytes, Tensor]:
        """The rows [K] that are known, by key."""
        wanted = list(dict.fromkeys(keys))

        def read(connection: sqlite3.Connection) -> list[tuple[bytes, bytes]]:
            found: list[tuple[bytes, bytes]] = []
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                found += connection.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", some).fetchall()
            return found

        rows = ((key, _decoded(key, value)) for key, value in self._database.run(read))
        return {key: row for key, row in rows if row is not None}

    def put(self, rows: Mapping[bytes, Tensor]) -> None:
        """Keep rows [K], float32 or float64, by key; all of them or, where the disk fails, none."""
        values = [(key, _encoded(key, row)) for key, row in rows.items()]
        self._database.run(
            lambda connection: connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", values)
        )

    def __len__(self) -> int:
        """How many answers there are."""
        return self._database.run(
            lambda connection: int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])
        )

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._database.close()


def keys_of(identity: str, batch: Tensor) -> list[bytes]:
    """The key of every example of a batch [N, …] on the CPU."""
    start = hashlib.blake2b(f"{identity}\0{batch.dtype}\0{list(batch.shape[1:])}\0".encode(), digest_size=32)
    flat = batch.contiguous().flatten(1).view(torch.uint8).numpy()
    keys = []
    for example in flat:
        digest = start.copy()
        digest.update(example)
        keys.append(digest.digest())
    return keys


def _encoded(key: bytes, row: Tensor) -> bytes:
    kind = b"d" if row.dtype == torch.float64 else b"f"
    payload = kind + row.numpy().astype(_TYPES[kind], copy=False).tobytes()
    return payload + _check_sum(key, payload)


def _decoded(key: bytes, value: bytes) -> Tensor | None:
    payload, check = value[:-_SUM_BYTES], value[-_SUM_BYTES:]
    if payload[:1] not in _TYPES or check != _check_sum(key, payload):
        return None
    return torch.from_numpy(np.frombuffer(payload[1:], _TYPES[payload[:1]]).astype(_TYPES[payload[:1]][1:]))


def _check_sum(key: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, key=key, digest_size=_SUM_BYTES).digest()
