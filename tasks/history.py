"""The record of a training run, one JSON object per line, written as it happens.

{"kind": "step", "step", "epoch", "loss", "accuracy", "learning_rate", "queries", "queries_per_second",
 "forward_flops", "seconds", "peak_memory_bytes"}           loss and accuracy on the batch; the rest cumulative
 where the cost model has a say also "step_seconds", "predicted_seconds", "share_of_peak", of this step alone
{"kind": "evaluation", "step", "epoch", "queries", "seconds", "test_accuracy", "test_loss"}
 of a corrector "validation_mae" in place of the last two, null where a simulation diverged
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tasks.stage import write_atomically


class History:
    """Appends lines; what a killed run wrote beyond its last checkpoint is cut off on opening."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        kept = [line for line in read(path) if line["step"] <= last_step] if path.exists() else []
        # Atomically: a kill at this moment must not take what belongs to the checkpoint.
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, text)
        self.kept = kept
        self._digest, self._bytes = hashlib.sha256(text.encode()), len(text.encode())
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line) + "\n"
        self._file.write(text)
        self._digest.update(text.encode())
        self._bytes += len(text.encode())

    @property
    def mark(self) -> dict[str, Any]:
        """What a checkpoint keeps of the history that belongs to it: see `intact`."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def flush(self) -> None:
        """Make everything so far durable."""
        self._file.flush()
        os.fsync(self._file.fileno())


def intact(path: Path, mark: Any) -> bool:
    """Whether the file still begins with what it held when its `mark` was kept."""
    if not isinstance(mark, dict) or not isinstance(mark.get("bytes"), int):
        return False
    try:
        with path.open("rb") as file:
            found = file.read(mark["bytes"])
    except OSError:
        found = b""
    return len(found) == mark["bytes"] and hashlib.sha256(found).hexdigest() == mark.get("sha256")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a history up to the first that is none: a kill cuts the last one short."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            return
        yield line
