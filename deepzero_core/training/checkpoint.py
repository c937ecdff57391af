"""Checkpoints that a killed process cannot damage and a damaged disk cannot pass off as good.

A file is one line, `deepzero-checkpoint 1 SHA256`, and then what `torch.save` writes. It appears under its name only
when it is complete (written beside, flushed to disk, renamed). Loading checks the sum first and unpickles nothing but
tensors and plain values.
"""

import hashlib
import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepzero_core.durable import PART, replacing
from deepzero_core.errors import RequestError, WorkError

_MAGIC = b"deepzero-checkpoint 1 "
_NAME = re.compile(r"step-(\d{8})\.ckpt")


class DamagedCheckpointError(RequestError):
    """The file is not what was written; the message names it and says how it differs."""


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint, and why newer ones were passed over."""

    state: dict[str, Any] | None
    path: Path | None
    damaged: tuple[str, ...] = field(default=())


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, plain values, containers of them) to `path`, atomically and durably.

    Raises:
        WorkError: the disk does not take it; earlier checkpoints are as they were.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(_MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    except OSError as error:
        raise WorkError(f"checkpoint {path} cannot be written: {error.strerror}; earlier ones are intact") from error


def load(path: Path) -> dict[str, Any]:
    """The state of one checkpoint.

    Raises:
        DamagedCheckpointError: cut short, altered, or never a checkpoint.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    header, _, payload = data.partition(b"\n")
    if not header.startswith(_MAGIC):
        raise DamagedCheckpointError(f"{path} is not a deepzero checkpoint")
    expected, actual = header[len(_MAGIC) :].decode("ascii", "replace"), hashlib.sha256(payload).hexdigest()
    if expected != actual:
        raise DamagedCheckpointError(
            f"checkpoint {path} is damaged: its content has sha256 {actual[:12]}…, {expected[:12]}… was written"
        )
    try:
        state = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise DamagedCheckpointError(f"checkpoint {path} holds more than tensors and plain values") from error
    # The sum fits, so somebody has made this file on purpose: torch's reader may raise anything.
    except Exception as error:
        raise DamagedCheckpointError(
            f"checkpoint {path} is not what torch.save writes: {type(error).__name__}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise DamagedCheckpointError(f"checkpoint {path} is not a dictionary of named values")
    return state


def save_step(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the checkpoint of a step into `folder` and remove all but the newest `keep`."""
    path = folder / f"step-{step:08d}.ckpt"
    save(path, state)
    for old in _steps(folder)[keep:]:
        old.unlink(missing_ok=True)
    for abandoned in folder.glob(f"*{PART}"):
        abandoned.unlink(missing_ok=True)
    return path


def load_newest(folder: Path, refuse: Callable[[dict[str, Any]], str | None] = lambda state: None) -> Found:
    """The newest good checkpoint of `folder`; damaged ones are passed over and named.

    refuse: why a state is of no use to the caller, as the end of a sentence about its checkpoint; None: it is.
    """
    damaged: list[str] = []
    for path in _steps(folder):
        try:
            state = load(path)
        except DamagedCheckpointError as error:
            damaged.append(str(error))
            continue
        reason = refuse(state)
        if reason is None:
            return Found(state, path, tuple(damaged))
        damaged.append(f"checkpoint {path} {reason}")
    return Found(None, None, tuple(damaged))


def _steps(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)
