"""What every stage has in common: a folder named by what it depends on, done once, skipped when nothing changed.

The key of a stage is a digest of its inputs (the part of the configuration it reads, the digest of its data, the
records of earlier stages) and of the code. Its folder holds what it makes; `record.json` appears last, atomically, and
marks it complete. Two equal stages started at once wait for each other and do the work once. A stage that was killed
finds its folder again and goes on from what is there.
"""

import functools
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

import filelock
from prefect import task
from prefect.states import Completed, State
from pydantic import BaseModel

import deepzero_core
import infra
import simulators
import tasks
from deepzero_core.durable import replacing
from deepzero_core.errors import WorkError
from infra.home import home
from tasks.progress import concluded, skipped
from tasks.records import Record
from tasks.tracking import Run

_log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)
P = ParamSpec("P")


class Tracking(Record):
    """Where a flow run's stages log: the MLflow experiment and the parent run."""

    experiment_id: str
    run_id: str


class Completion(Record):
    """The content of `record.json`: the stage's record, the MLflow run that made it, and sums that tell damage."""

    record: dict[str, Any]
    metrics: dict[str, float]
    run_id: str
    files: dict[str, str]
    """sha256 of what the stage has made, by name below its folder."""

    @property
    def sum(self) -> str:
        """sha256 of all of the above."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


@dataclass
class Stage:
    """One stage at work: its folder, its MLflow run, and the metrics that sum it up."""

    title: str
    folder: Path
    run: Run
    metrics: dict[str, float]

    def summarise(self, **metrics: float) -> None:
        """Metrics that say how the stage ended: logged, and logged again by runs that skip it."""
        self.metrics.update(metrics)
        self.run.metrics(metrics, step=0)


def stage_task(name: str) -> Callable[[Callable[P, State[R] | R]], Callable[P, R]]:
    """A Prefect task whose caller gets the record, also where the task ended in the state "Cached"."""

    def decorate(function: Callable[P, State[R] | R]) -> Callable[P, R]:
        prefect_task = task(name=name)(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            outcome = prefect_task(*args, **kwargs)
            record: R = outcome.result() if isinstance(outcome, State) else outcome
            return record

        return call

    return decorate


def perform(
    tracking: Tracking, name: str, kind: type[R], inputs: dict[str, Any], work: Callable[[Stage], R], label: str = ""
) -> State[R] | R:
    """Do the work of a stage, or find it done.

    Returns the record; as Prefect's state "Cached" when nothing that the stage depends on has changed.
    """
    folder = home() / "stages" / name / key(name, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{name} {label}".strip()
    with filelock.FileLock(folder / "lock"):
        done = _completed(folder, kind)
        tags = {"deepzero.stage": name, "deepzero.stage_key": folder.name}
        if done is not None:
            completion, record = done
            tags["deepzero.cached_from"] = completion.run_id
            with Run.start(tracking.experiment_id, title, parent=tracking.run_id, tags=tags) as run:
                run.metrics(completion.metrics, step=0)
            skipped(title)
            return Completed(name="Cached", message="nothing it depends on has changed", data=record)
        with Run.start(tracking.experiment_id, title, parent=tracking.run_id, tags=tags) as run:
            started = time.monotonic()
            stage = Stage(title, folder, run, {})
            record = work(stage)
            completion = Completion(
                record=record.model_dump(mode="json"),
                metrics=stage.metrics,
                run_id=run.run_id,
                files={name: _sum(folder / name) for name in _made(folder)},
            )
            document = {**completion.model_dump(mode="json"), "sum": completion.sum}
            write_atomically(folder / "record.json", json.dumps(document, indent=2))
        concluded(title, time.monotonic() - started)
        return record


def key(name: str, inputs: dict[str, Any]) -> str:
    """Digest of a stage's name, inputs and code: 24 hexadecimal digits."""
    text = json.dumps({"stage": name, "inputs": _plain(inputs), "code": code_digest()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


_SOURCES = {".py", ".cpp", ".h"}


@functools.cache
def code_digest() -> str:
    """Digest of the sources that results depend on: core, infra, simulators and tasks."""
    digest = hashlib.sha256()
    for package in (deepzero_core, infra, simulators, tasks):
        root = Path(package.__file__ or "").parent
        for path in sorted(path for path in root.rglob("*") if path.suffix in _SOURCES):
            digest.update(f"{root.name}/{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """The file appears under its name with all of its content, or not at all."""
    with _replacing(path) as file:
        file.write(text.encode())


def save_tensors(path: Path, values: Mapping[str, Any]) -> None:
    """As `write_atomically`, in torch's format; WorkError when the disk does not take it."""
    import torch  # is needed here only

    buffer = io.BytesIO()  # of a full disk torch itself would say something else
    torch.save(dict(values), buffer)
    with _replacing(path) as file:
        file.write(buffer.getvalue())


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """As `replacing`, with a sentence where the disk does not take it."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise WorkError(f"{path} cannot be written: {error.strerror or error}") from error


def _completed(folder: Path, kind: type[R]) -> tuple[Completion, R] | None:
    """What an earlier run left, unless it is incomplete, or no longer what was written: then a warning says so."""
    file = folder / "record.json"
    if not file.exists():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        expected = document.pop("sum")
        completion = Completion.model_validate(document)
        record = kind.model_validate(completion.record)
        damaged = [file] if completion.sum != expected else list(_differing(folder, completion))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # whatever stands in it
        damaged = [file]
    if not damaged:
        named = [value for value in dict(record).values() if isinstance(value, Path)]
        damaged = [path for path in named if not path.exists()]
    if damaged:
        _log.warning("%s is damaged or gone: the stage %s is done again", damaged[0], folder.parent.name)
        return None
    return completion, record


# Grown on after the stage has ended, or of no use then.
_PASSING = {"lock", "record.json"}
_LIVING = {".sqlite", ".sqlite-wal", ".sqlite-shm", ".ckpt", ".part"}


def _made(folder: Path) -> list[str]:
    """What a stage has made, by name below its folder."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _PASSING and path.suffix not in _LIVING and not path.name.startswith(".")
    )


def _differing(folder: Path, completion: Completion) -> Iterator[Path]:
    """Files that are no longer what the stage made."""
    for name, expected in completion.files.items():
        path = folder / name
        if not path.is_file() or _sum(path) != expected:
            yield path


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """Inputs as JSON: models by their fields, records without the places their files happen to lie in."""
    if isinstance(value, BaseModel):
        return {name: _plain(item) for name, item in value if not isinstance(item, Path)}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
