"""Reference runs on disk: a folder with one Arrow IPC file per case, mapped into memory, and a manifest.

A file has a row per frame and a column per field, "frames/NAME" and "params/NAME", FixedSizeList of float32 or float64.
The manifest has the name, shapes, sha256 and size of every file, and what the cases were made from. A store is there
completely or not at all.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from deepzero_core.data import files
from deepzero_core.data.manifest import MANIFEST_FILE, digest_of
from deepzero_core.errors import RequestError
from simulators.cases import Case
from simulators.protocol import State

SCHEMA_VERSION = 2
SPLITS = ("train", "validation", "test")
_REMEDY = "remove it, and the cases are computed again"
_TYPES = {torch.float32: pa.float32(), torch.float64: pa.float64()}


@dataclass(frozen=True)
class CaseStore:
    """A store opened for reading."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> "CaseStore":
        """RequestError: no store, another version, or a file that is missing, cut short or (verify) changed."""
        try:
            manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="ascii"))
            good = isinstance(manifest, dict) and manifest.pop("digest", None) == digest_of(manifest)
        except (OSError, ValueError) as error:
            raise RequestError(f"the cases in {path} cannot be read ({error}); {_REMEDY}") from error
        if not good or manifest["schema_version"] != SCHEMA_VERSION:
            raise RequestError(f"the cases in {path} are damaged or of another version: {MANIFEST_FILE}; {_REMEDY}")
        for split in SPLITS:
            for entry in manifest["cases"][split]:
                _check(path / entry["file"], entry, verify)
        return cls(path, manifest)

    @property
    def digest(self) -> str:
        """sha256 of what the store holds and of what it was made from."""
        return digest_of(dict(self.manifest))

    def cases(self, split: str) -> list[Case]:
        """All cases of a split; a copy."""
        return [_read(self.path / entry["file"], entry) for entry in self.manifest["cases"][split]]


def write_cases(path: Path, splits: Mapping[str, Sequence[Case]], facts: Mapping[str, Any]) -> CaseStore:
    """Write a store; another one in its place is replaced. A split that is not given has no cases.

    facts: what the cases were made from, JSON-able.
    RequestError: a place that cannot be used, fields that are not float32 or float64. WorkError: the disk failed.
    """
    names: set[str] = {MANIFEST_FILE}
    with files.staging_folder(path) as staging:
        entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            for number, case in enumerate(splits.get(split, ())):
                file = f"{split}-{number}.arrow"
                names.add(file)
                columns = _columns(case)
                files.write_arrow(staging / file, _batch(columns))
                entries[split].append(
                    {
                        "name": case.name,
                        "file": file,
                        "shapes": {name: list(value.shape) for name, value in columns.items()},
                        "sha256": files.sha256(staging / file),
                        "bytes": (staging / file).stat().st_size,
                    }
                )
        manifest = {"schema_version": SCHEMA_VERSION, "facts": dict(facts), "cases": entries}
        text = json.dumps(manifest | {"digest": digest_of(manifest)}, indent=2, allow_nan=False) + "\n"
        files.write_bytes(staging / MANIFEST_FILE, text.encode("ascii"))
        old = {entry.name for entry in path.glob("*.arrow")}
        files.install(staging, path, keep=lambda: _is_intact(path, digest_of(manifest)), known=names | old | {"lock"})
    return CaseStore.open(path)


def _columns(case: Case) -> dict[str, Tensor]:
    fields = {"frames": case.frames, "params": case.params}
    return {f"{kind}/{name}": value for kind, some in fields.items() for name, value in some.items()}


def _batch(columns: Mapping[str, Tensor]) -> pa.RecordBatch:
    arrays = []
    for name, value in columns.items():
        if value.dtype not in _TYPES:
            raise RequestError(f"the field {name!r} of a case is {value.dtype}; cases are of float32 or float64")
        width = math.prod(value.shape[1:])
        flat = np.ascontiguousarray(value.numpy()).reshape(-1)
        values = pa.Array.from_buffers(_TYPES[value.dtype], flat.size, [None, pa.py_buffer(flat)])
        arrays.append(pa.FixedSizeListArray.from_arrays(values, width))
    return pa.record_batch(arrays, names=list(columns))


def _check(path: Path, entry: Mapping[str, Any], verify: bool) -> None:
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        raise RequestError(f"the case {path} is missing or cut short; {_REMEDY}")
    if verify and files.sha256(path) != entry["sha256"]:
        raise RequestError(f"the case {path} is not as it was written; {_REMEDY}")


def _read(path: Path, entry: Mapping[str, Any]) -> Case:
    found: dict[str, State] = {"frames": {}, "params": {}}
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        batch = reader.get_batch(0)
        for column, shape in entry["shapes"].items():
            kind, _, name = column.partition("/")
            values = batch.column(column).flatten().to_numpy(zero_copy_only=True)
            found[kind][name] = torch.from_numpy(values.copy()).view(shape)
    return Case(entry["name"], found["frames"], found["params"])


def _is_intact(path: Path, digest: str) -> bool:
    try:
        return CaseStore.open(path, verify=True).digest == digest
    except RequestError:
        return False
