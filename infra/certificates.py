"""Certificates on disk: one small Parquet file per example while they come, one table when all are there.

parts/NNNNNN.parquet    a row, in its place by an atomic rename: a process killed at any moment leaves whole rows
certificates.parquet    all rows in order, when they are complete; then the parts go

Equal certifications leave equal tables, byte for byte, however often they were interrupted and wherever they ran.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deepzero_core.durable import replacing
from deepzero_core.smoothing import Certificate

TABLE = "certificates.parquet"
_SCHEMA = pa.schema(
    {
        "example": pa.int64(),
        "label": pa.int64(),
        "predicted": pa.int64(),
        "radius": pa.float64(),
        "p_lower": pa.float64(),
        "samples": pa.int64(),
        "saved": pa.int64(),
    }
)


class Certificates:
    """The certificates of numbered examples in a folder, which belongs to one certification alone."""

    def __init__(self, folder: Path, labels: Sequence[int]) -> None:
        self._folder, self._labels = folder, labels
        self._parts = folder / "parts"
        self._parts.mkdir(parents=True, exist_ok=True)
        self.found = self._read()

    @property
    def table(self) -> Path:
        return self._folder / TABLE

    def add(self, number: int, certificate: Certificate) -> None:
        """Keep one; on disk when this returns."""
        _write(self._parts / f"{number:06d}.parquet", {number: certificate}, self._labels)
        self.found[number] = certificate

    def close(self) -> list[Certificate]:
        """The table of all, written; the certificates in order."""
        _write(self.table, self.found, self._labels)
        shutil.rmtree(self._parts)
        return [self.found[number] for number in range(len(self._labels))]

    def _read(self) -> dict[int, Certificate]:
        found: dict[int, Certificate] = {}
        for path in [self.table, *sorted(self._parts.glob("[0-9]*.parquet"))]:
            try:
                table = pq.read_table(path, page_checksum_verification=True)
            except (OSError, ValueError):  # not there, or damaged: made again
                continue
            for row in table.to_pylist() if table.schema.equals(_SCHEMA) else ():
                found[row["example"]] = Certificate(
                    row["predicted"], row["radius"], row["samples"], row["p_lower"], row["saved"]
                )
        return {number: found[number] for number in sorted(found) if number < len(self._labels)}


def _write(path: Path, certificates: Mapping[int, Certificate], labels: Sequence[int]) -> None:
    rows = [
        {
            "example": number,
            "label": labels[number],
            "predicted": one.label,
            "radius": one.radius,
            "p_lower": one.p_lower,
            "samples": one.samples,
            "saved": one.saved,
        }
        for number, one in sorted(certificates.items())
    ]
    with replacing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file, write_page_checksum=True)
