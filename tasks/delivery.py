"""From the spool of a run to MLflow: in order, at least once, and without doubles.

Entries, by "kind":
    create   {"experiment_id", "name", "tags", "time"}      a run that began while MLflow was away; first in its spool
    metrics  {"points": [[key, value, time, step], …]}
    params   {"values": {key: text}}            tags  {"values": {key: text}}
    reopen   {"tags"}                           the run goes on: RUNNING, without the reason of its last end
    file     {"name", "folder"}                 a file or folder below the spool's own
    dataset  {"name", "digest", "facts"}
    end      {"status", "time"}
times in milliseconds since 1970.

An attempt may fail after MLflow has taken what it carried, and a killed process cannot say how far it came. Whoever
goes on then asks first which (key, step) the run has, and sends the others; params, tags and files are the same when
they are sent twice; a run that was begun already is recognised by its tag `deepzero.id`.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from deepzero_core.errors import WorkError
from tasks.entries import fault
from tasks.gate import Gate, gate
from tasks.spool import Spool
from tasks.tracking_store import REASON, STORE_ERRORS, one_line, tracking_uri

_log = logging.getLogger(__name__)

# MLflow's limits on one request.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
ID = "deepzero.id"

# Errors after which the same request would fail again. All others may pass: they wait.
_REFUSALS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "NOT_IMPLEMENTED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}

# Of these, the ones that a single bad value in a request brings about.
_OF_ONE_VALUE = {"BAD_REQUEST", "INVALID_PARAMETER_VALUE"}

Point = tuple[str, float, int, int]
"""Key, value, time, step."""


class UnavailableError(WorkError):
    """The store does not answer now. What it was to be told waits."""


class RefusedError(WorkError):
    """The store answers and does not take it; it would not take it later either.

    entries: what is refused, where that is less than what was sent.
    """

    def __init__(self, message: str, entries: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.entries = entries


@contextmanager
def asking(door: Gate, what: str) -> Iterator[None]:
    """Turn the errors of the store into one of the two above, and tell the gate."""
    try:
        yield
    except STORE_ERRORS as error:
        message = f"MLflow did not take {what}: {one_line(error)}"
        if isinstance(error, MlflowException) and error.error_code in _REFUSALS:
            raise RefusedError(message) from error
        door.failed(one_line(error))
        raise UnavailableError(message) from error


class Outbox:
    """What one run has to tell. Safe for several threads; one process at a time."""

    def __init__(self, spool: Spool, run_id: str, *, began: bool = True, doubt: bool = False) -> None:
        """`began`: whether MLflow knows the run; `doubt`: whether it may have some of what the spool holds."""
        self.run_id = run_id
        self.spool = spool
        self._began = began
        self._doubt = doubt
        self._known: dict[str, set[int]] = {}
        self._offset = spool.start
        self._uri = tracking_uri()
        self.gate = gate(self._uri)
        self._turn = threading.RLock()

    @cached_property
    def client(self) -> MlflowClient:
        """A client of the store that was named when the outbox was opened; made when it is needed, for it connects."""
        return MlflowClient(tracking_uri=self._uri)

    def suspect(self) -> None:
        """MLflow may have some of what comes: somebody else spoke for this run."""
        self._doubt = True

    def at_home(self) -> bool:
        """Whether the store is the one that this was meant for: it has the run or, before that has begun, its parent.

        Raises:
            UnavailableError: the store does not answer.
        """
        run_id: str | None = self.run_id
        if not self._began:
            first = next((line.entry for line in self.spool.read(self.spool.start) if line.entry), {})
            tags = first.get("tags")
            run_id = tags.get("mlflow.parentRunId") if isinstance(tags, dict) else None
        try:
            with asking(self.gate, "a question"):
                return run_id is not None and self.client.get_run(run_id) is not None
        except RefusedError:
            return False

    def put(self, entry: Mapping[str, Any]) -> None:
        """Keep an entry; WorkError when the disk does not take it."""
        with self._turn:
            self.spool.append(entry)

    def say(self, entry: Mapping[str, Any]) -> None:
        """Keep an entry, and deliver it now where the store answers. RefusedError when it is not taken."""
        self.put(entry)
        self.try_to_deliver()

    def try_to_deliver(self) -> bool:
        """Deliver what waits, unless the store is away; whether nothing is left. RefusedError as `deliver`."""
        if not self.gate.passable():
            return False
        try:
            self.deliver()
        except UnavailableError:
            return False
        return True

    def file(self, path: Path, folder: str | None) -> None:
        """A file, or what a folder holds, as artifact: copied into the spool only where the store is away."""
        if not path.exists():
            raise WorkError(f"MLflow did not take artifact {path}: there is no such file")
        with self._turn:
            if self.try_to_deliver():
                try:
                    self._send_file(path, folder)
                    return
                except UnavailableError:
                    pass
            kept = self.spool.keep(path)
            self.put({"kind": "file", "name": str(kept.relative_to(self.spool.files)), "folder": folder})

    def deliver(self) -> None:
        """Send everything that waits, in order.

        Raises:
            UnavailableError: the store does not answer; what it has not taken waits on.
            RefusedError: it does not take an entry. The entry is put aside, the others are delivered.
        """
        refusal: RefusedError | None = None
        with self._turn:
            if self.spool.empty:
                return
            for entries, end in self._batches():
                try:
                    self._send(entries)
                except RefusedError as error:
                    self._set_aside(error.entries or entries, error)
                    refusal = refusal or error
                except UnavailableError:
                    self._doubt = True
                    self._known.clear()  # what has just been tried may have arrived or not
                    raise
                self._offset = end
            self._known.clear()
            self._doubt = False
            self.spool.clear(head(self.run_id))
            self._offset = self.spool.start
        self.gate.succeeded()
        if refusal is not None:
            raise refusal

    def close(self) -> None:
        """Let go of the spool; where something waits in it, others can deliver it from now on."""
        with self._turn:
            self.spool.close()

    def _batches(self) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """Entries that go together, and where the next ones begin: metrics as many as a request takes, others alone."""
        together: list[dict[str, Any]] = []
        points, end, damaged = 0, self._offset, 0
        for line in self.spool.read(self._offset):
            entry = line.entry
            if entry is None:
                damaged += 1
                continue
            size = len(_points(entry)) if entry.get("kind") == "metrics" else METRICS_PER_BATCH
            if together and points + size > METRICS_PER_BATCH:
                yield together, end
                together, points = [], 0
            together.append(entry)
            points, end = points + size, line.end
        if damaged:
            _log.warning("%s: %d of its lines are damaged and are left out", self.spool.path, damaged)
        if together:
            yield together, end

    def _send(self, entries: list[dict[str, Any]]) -> None:
        kind = entries[0].get("kind")
        if kind == "metrics":
            refused: list[tuple[Point, RefusedError]] = []
            self._send_metrics([point for entry in entries for point in _points(entry)], refused)
            if refused:
                points = [point for point, _ in refused]
                raise RefusedError(str(refused[0][1]), [{"kind": "metrics", "points": points}]) from refused[0][1]
            return
        send = _SENDERS.get(str(kind))
        try:
            if send is None:
                raise RefusedError(f"MLflow cannot be told an entry of the kind {kind!r}")
            if wrong := fault(entries[0]):
                raise RefusedError(f"an entry of the kind {kind!r} is not what was written: {wrong}")
            send(self, entries[0])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RefusedError(f"an entry of the kind {kind!r} is not what was written: {one_line(error)}") from error

    def _send_metrics(self, points: list[Point], refused: list[tuple[Point, RefusedError]]) -> None:
        """Send points; what the store does not take of them is found by halving and added to `refused`."""
        try:
            with asking(self.gate, f"{len(points)} metrics"):
                if self._doubt:
                    points = self._unknown(points)
                if points:
                    self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in points])
        except RefusedError as error:
            whole = getattr(error.__cause__, "error_code", "") not in _OF_ONE_VALUE
            if whole or len(points) == 1:
                refused += [(point, error) for point in points]
                return
            if self._doubt:
                self._known.clear()
            half = len(points) // 2
            self._send_metrics(points[:half], refused)
            self._send_metrics(points[half:], refused)

    def _unknown(self, points: list[Point]) -> list[Point]:
        """Those that the run does not have."""
        left = []
        for point in points:
            key, step = point[0], point[3]
            if key not in self._known:
                self._known[key] = {found.step for found in self.client.get_metric_history(self.run_id, key)}
            if step not in self._known[key]:
                self._known[key].add(step)
                left.append(point)
        return left

    def _send_params(self, entry: dict[str, Any]) -> None:
        params = [Param(key, value) for key, value in entry["values"].items()]
        with asking(self.gate, "parameters"):
            for start in range(0, len(params), PARAMS_PER_BATCH):
                self.client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_BATCH])

    def _send_tags(self, entry: dict[str, Any]) -> None:
        with asking(self.gate, "tags"):
            self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in entry["values"].items()])

    def _send_kept(self, entry: dict[str, Any]) -> None:
        place = (self.spool.files / entry["name"]).resolve()
        if not place.is_relative_to(self.spool.files.resolve()) or not place.exists():
            raise RefusedError(f"MLflow did not take artifact {entry['name']}: it is no longer beside the spool")
        self._send_file(place, entry["folder"])

    def _send_file(self, path: Path, folder: str | None) -> None:
        client = self.client
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        with asking(self.gate, f"artifact {path}"):
            log(self.run_id, str(path), folder)

    def _send_dataset(self, entry: dict[str, Any]) -> None:
        name, digest, facts = entry["name"], entry["digest"], entry["facts"]
        source = json.dumps({"name": name})
        # MLflow takes 36 characters of a digest.
        found = Dataset(name=name, digest=digest[:36], source_type="deepzero", source=source, profile=json.dumps(facts))
        tag = InputTag("mlflow.data.context", "training")
        with asking(self.gate, f"data set {name!r}"):
            self.client.log_inputs(self.run_id, datasets=[DatasetInput(found, tags=[tag])])

    def _send_reopen(self, entry: dict[str, Any]) -> None:
        with asking(self.gate, f"the resumption of run {self.run_id}"):
            client = self.client
            client.update_run(self.run_id, status="RUNNING")
            client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in entry["tags"].items()])
            if REASON in client.get_run(self.run_id).data.tags:
                client.delete_tag(self.run_id, REASON)

    def _send_create(self, entry: dict[str, Any]) -> None:
        if self._began:
            return
        with asking(self.gate, f"run {entry['name']!r}"):
            same = f"tags.`{ID}` = '{entry['tags'][ID]}'"
            begun = self.client.search_runs([entry["experiment_id"]], same, max_results=1)
            self.run_id = begun[0].info.run_id if begun else create(self.client, entry)
        self._began = True

    def _send_end(self, entry: dict[str, Any]) -> None:
        with asking(self.gate, f"the end of run {self.run_id}"):
            self.client.set_terminated(self.run_id, entry["status"], entry["time"])

    def _set_aside(self, entries: Sequence[Mapping[str, Any]], error: RefusedError) -> None:
        aside = self.spool.path.with_suffix(".refused")
        with aside.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        _log.warning("%s; it is kept in %s", error, aside)


def _points(entry: Mapping[str, Any]) -> list[Point]:
    """The points of an entry; those that are none are left out, for the file may hold anything."""
    found = entry.get("points")
    return [
        (point[0], point[1], point[2], point[3])
        for point in (found if isinstance(found, list) else ())
        if isinstance(point, list)
        and len(point) == 4
        and isinstance(point[0], str)
        and isinstance(point[1], float)
        and all(isinstance(number, int) and abs(number) < 2**62 for number in point[2:])
    ]


_SENDERS = {
    "create": Outbox._send_create,
    "params": Outbox._send_params,
    "tags": Outbox._send_tags,
    "reopen": Outbox._send_reopen,
    "file": Outbox._send_kept,
    "dataset": Outbox._send_dataset,
    "end": Outbox._send_end,
}


def new_id() -> str:
    """What a run is called until MLflow has given it an id, and recognised by afterwards."""
    return uuid4().hex


def head(run_id: str, *, began: bool = True) -> dict[str, Any]:
    """First line of a spool. It does not name the store, whose address may hold a password: see `Outbox.at_home`."""
    return {"kind": "run", "run_id": run_id, "began": began}


def create(client: MlflowClient, entry: Mapping[str, Any]) -> str:
    """Begin the run that an entry "create" describes; its id."""
    experiment, name = entry["experiment_id"], entry["name"]
    return str(client.create_run(experiment, entry["time"], entry["tags"], name).info.run_id)


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)
