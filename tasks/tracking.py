"""Runs in MLflow: opened once, written in batches, ended honestly.

Every call names its run: nothing here touches MLflow's thread-local active run, so runs of several threads and stages
do not mix. The store is `$MLFLOW_TRACKING_URI` where that is set, else a SQLite file below deepzero's home.

What a run tells goes through a file (`tasks.spool`), so that neither a store that is away nor a kill loses any of it:
the work goes on meanwhile, and `tasks.delivery` makes up for it later.

A process that is killed cannot end its runs. They carry the process's id and starting time, and the next `initialise`
on the same machine ends what no living process owns.
"""

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from uuid import uuid4

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput

from deepzero_core.errors import RequestError, WorkError
from infra.home import home
from tasks.beside import beside
from tasks.delivery import ID, Outbox, RefusedError, UnavailableError, asking, create, head, now_ms
from tasks.environment import environment, git_state
from tasks.gate import gate
from tasks.spool import Spool, SpoolInUseError, place
from tasks.tracking_store import REASON, initialise, one_line, owner, run_url, tracking_uri, ui_command

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Run", "environment", "initialise", "metrics_of", "run_url", "tracking_uri", "ui_command"]

_log = logging.getLogger(__name__)

# Limits of MLflow on one value.
_PARAM_CHARACTERS = 6000
_TAG_CHARACTERS = 8000

_FLUSH_POINTS = 500
_FLUSH_SECONDS = 10.0

# History field → metric and its unit in the field's; the part before the slash is a group of charts in MLflow's pages.
_STEP_METRICS = {
    "loss": ("train/loss", 1.0),
    "accuracy": ("train/accuracy", 1.0),
    "learning_rate": ("train/learning_rate", 1.0),
    "queries": ("cost/queries", 1.0),
    "queries_per_second": ("cost/queries_per_second", 1.0),
    "forward_flops": ("cost/forward_gflop", 1e9),
    "seconds": ("cost/seconds", 1.0),
    "peak_memory_bytes": ("cost/peak_memory_mib", 2.0**20),
    "step_seconds": ("cost/step_seconds", 1.0),
    "predicted_seconds": ("cost/predicted_step_seconds", 1.0),
    "share_of_peak": ("cost/share_of_peak", 1.0),
    "solver_steps": ("simulator/steps", 1.0),
    "solver_steps_per_second": ("simulator/steps_per_second", 1.0),
    "diverged": ("simulator/diverged", 1.0),
    "crashed": ("simulator/crashed", 1.0),
    "restarts": ("simulator/restarts", 1.0),
}
_EVALUATION_METRICS = {
    "test_accuracy": ("test/accuracy", 1.0),
    "test_loss": ("test/loss", 1.0),
    "validation_mae": ("validation/mae", 1.0),
}


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Metrics, by their names in MLflow, of one line of a training history; fields that it lacks are left out."""
    names = _EVALUATION_METRICS if record.get("kind") == "evaluation" else _STEP_METRICS
    return {
        metric: float(record[field]) / unit for field, (metric, unit) in names.items() if record.get(field) is not None
    }


class Run:
    """One MLflow run. As a context manager it ends as FINISHED, FAILED or KILLED, with the reason in a tag.

    Not for several threads at once: give each its own run.
    """

    def __init__(self, outbox: Outbox, experiment_id: str, *, last_steps: dict[str, int]) -> None:
        """Use `start` or `resume`."""
        self.experiment_id = experiment_id
        self._outbox = outbox
        self._last_steps = last_steps
        self._waiting = 0
        self._flushed = time.monotonic()
        self._sending: Future[bool] | None = None
        self._ended = False

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; until MLflow has been told of it, one of our own, which its tag deepzero.id keeps."""
        return self._outbox.run_id

    @classmethod
    def start(
        cls,
        experiment_id: str,
        name: str,
        *,
        parent: "Run | str | None" = None,
        description: str | None = None,
        tags: Mapping[str, object] | None = None,
        params: Mapping[str, object] | None = None,
    ) -> Self:
        """Open a run.

        Args:
            experiment_id: what `initialise` returned.
            name: shown in the list of runs.
            parent: run, or id of one, below which this one is shown.
            description: Markdown at the head of the run's page.
            tags: further tags.
            params: settings, nested mappings allowed: {"data": {"name": "digits"}} is logged as data.name. Values
                longer than MLflow takes are cut, and the artifact config/params.json then holds them all, whole.

        Where MLflow is away, a run with a parent begins all the same and MLflow is told later.

        Raises:
            WorkError: MLflow did not take it.
        """
        commit, dirty = git_state(Path(__file__).resolve().parent.parent)
        own = uuid4().hex
        standard = {
            **owner(),
            ID: own,
            "mlflow.source.name": "deepzero",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": commit,
            "mlflow.source.git.dirty": dirty,
        }
        standard = {key: value for key, value in standard.items() if value != "unknown"}
        if parent is not None:
            standard["mlflow.parentRunId"] = parent if isinstance(parent, str) else parent.run_id
        if description is not None:
            standard["mlflow.note.content"] = description
        given = {key: str(value)[:_TAG_CHARACTERS] for key, value in (tags or {}).items()}
        entry = {"experiment_id": experiment_id, "name": name, "tags": {**given, **standard}, "time": now_ms()}
        run = cls(_begin(entry, own, may_wait=parent is not None), experiment_id, last_steps={})
        run.params(params or {})
        return run

    @classmethod
    def resume(cls, run_id: str) -> Self:
        """Go on with a run that this or another process began.

        Steps that it has recorded are not recorded again: a trainer that goes back to its last checkpoint repeats them.

        Raises:
            RequestError: there is no such run.
        """
        outbox, experiment_id, last = _outbox_of(run_id), "", {}
        try:
            if outbox.try_to_deliver():
                with asking(outbox.gate, f"the resumption of run {run_id}"):
                    found = outbox.client.get_run(run_id)
                    experiment_id = found.info.experiment_id
                    histories = {key: outbox.client.get_metric_history(run_id, key) for key in found.data.metrics}
                last = {key: max(point.step for point in points) for key, points in histories.items()}
            else:
                outbox.suspect()
            outbox.say({"kind": "reopen", "tags": owner()})
        except RefusedError as error:
            _drop(outbox)
            reason = one_line(error.__cause__ or error)
            raise RequestError(f"MLflow run {run_id} cannot be resumed: {reason}") from error
        except UnavailableError:
            outbox.suspect()
            outbox.put({"kind": "reopen", "tags": owner()})
        return cls(outbox, experiment_id, last_steps=last)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step. They are kept on disk at once, and sent in batches, every few seconds, while the
        caller goes on, or when `flush` is called; a store that does not answer in the meantime costs nothing.

        Raises:
            WorkError: the disk does not take them.
        """
        now = now_ms()
        points = [
            (key, float(value), now, step)
            for key, value in values.items()
            if step > self._last_steps.get(key, step - 1)
        ]
        if not points:
            return
        self._outbox.put({"kind": "metrics", "points": points})
        self._waiting += len(points)
        due = self._waiting >= _FLUSH_POINTS or time.monotonic() - self._flushed >= _FLUSH_SECONDS
        if due and (self._sending is None or self._sending.done()):
            self._settle()
            self._sending = beside(self._send)

    def flush(self) -> None:
        """Send what waits, if the store is there; if it is not, make sure that it survives a loss of power."""
        self._settle()
        if not self._send():
            self._outbox.spool.sync()

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags."""
        self._say({"kind": "tags", "values": {key: str(value)[:_TAG_CHARACTERS] for key, value in values.items()}})

    def params(self, params: Mapping[str, object]) -> None:
        """Record settings, as `start` does."""
        flat = dict(_flattened(params))
        if flat:
            self._say({"kind": "params", "values": {key: _shortened(value) for key, value in flat.items()}})
        if any(len(value) > _PARAM_CHARACTERS for value in flat.values()):
            self.text(json.dumps(params, indent=2, default=str), "config/params.json")

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or what a folder holds, into the run's artifacts, below `folder`."""
        self._outbox.file(path, folder)

    def text(self, text: str, name: str) -> None:
        """Write an artifact `name`, such as config/experiment.yaml."""
        folder, _, file = name.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="deepzero-text-") as temporary:
            path = Path(temporary) / file
            path.write_text(text, encoding="utf-8")
            self.artifact(path, folder or None)

    def dataset(self, name: str, digest: str, facts: Mapping[str, object]) -> None:
        """Show the data that the run reads; `facts`, such as counts and licence, are shown with it."""
        plain = json.loads(json.dumps(facts, default=str))
        self._say({"kind": "dataset", "name": name, "digest": digest, "facts": plain})

    def model(self, module: "nn.Module", example: "Tensor", name: str) -> str:
        """Log a network so that `mlflow.pytorch.load_model(uri)` gives back its scores, for any size of batch.

        The module (nn.Module, left as it is) is exported in eval mode, on the CPU, to the pickle-free pt2 format.

        Args:
            module: network from [N, …] to [N, K].
            example: inputs, float32 tensor [N, …], N ≥ 1.
            name: of the logged model.

        Returns:
            The URI, models:/m-….

        Raises:
            WorkError: the network cannot be exported, or would not give the same scores after loading.
        """
        from tasks.tracking_model import save_model  # torch is needed here only

        return self.saved_model(name, lambda path, logged: save_model(module, example, path, logged, self.run_id))

    def saved_model(self, name: str, save: Callable[[Path, LoggedModel], None]) -> str:
        """Log what `save` writes, in MLflow's format, into the new folder it is given; the URI, models:/m-….

        The store has to be there: it names the model.

        Raises:
            WorkError: MLflow did not take it; and whatever `save` raises.
        """
        self._outbox.try_to_deliver()
        client = self._outbox.client
        with (
            tempfile.TemporaryDirectory(prefix="deepzero-model-") as temporary,
            asking(self._outbox.gate, f"model {name!r}"),
        ):
            experiment_id = self.experiment_id or client.get_run(self.run_id).info.experiment_id
            logged = client.create_logged_model(experiment_id, name=name, source_run_id=self.run_id)
            status: Literal["READY", "FAILED"] = "FAILED"
            try:
                path = Path(temporary) / "model"
                save(path, logged)
                client.log_model_artifacts(logged.model_id, str(path))
                client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])
                status = "READY"
            finally:
                client.finalize_logged_model(logged.model_id, status)
        return str(logged.model_uri)

    def end(self, status: str = "FINISHED", reason: str | None = None) -> None:
        """End the run as FINISHED, FAILED or KILLED, after all that waits; ending it again does nothing."""
        if self._ended:
            return
        self._ended = True
        try:
            self._settle()
            if reason is not None:
                self._outbox.put({"kind": "tags", "values": {REASON: reason[:_TAG_CHARACTERS]}})
            self._outbox.say({"kind": "end", "status": status, "time": now_ms()})
        except WorkError as error:
            _log.warning("%s", error)
        finally:
            _drop(self._outbox)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
            return
        # What ends a process (KeyboardInterrupt, SystemExit, Prefect's TerminationSignal) is no Exception.
        self.end("FAILED" if isinstance(error, Exception) else "KILLED", reason=one_line(error))

    def _say(self, entry: Mapping[str, Any]) -> None:
        self._outbox.say(entry)
        self._waiting = 0

    def _send(self) -> bool:
        """Deliver what waits; whether nothing is left. What is refused has been put aside, with a warning."""
        try:
            return self._outbox.try_to_deliver()
        except RefusedError:
            return True

    def _settle(self) -> None:
        """Wait for what is being sent; the next is due anew. WorkError: the disk did not take what was refused."""
        self._flushed, self._waiting = time.monotonic(), 0
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()


def _flattened(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _shortened(value: str) -> str:
    return value if len(value) <= _PARAM_CHARACTERS else f"{value[: _PARAM_CHARACTERS - 1]}…"


# One outbox for each run of this process, however many `Run`s speak for it: what they tell stays in order.
_outboxes: dict[str, Outbox] = {}
_outboxes_turn = threading.Lock()


def _outbox_of(run_id: str, *, began: bool = True) -> Outbox:
    with _outboxes_turn:
        if run_id in _outboxes:
            return _outboxes[run_id]
        path, number = place(home(), run_id), 1
        while True:
            try:
                existed = path.exists()
                spool = Spool(path, head(run_id, began=began))
            except SpoolInUseError:  # another process speaks for the same run
                path, number = place(home(), f"{run_id}-{number}"), number + 1
                continue
            outbox = Outbox(spool, str(spool.head.get("run_id", run_id)), began=began, doubt=existed)
            _outboxes[run_id] = outbox
            return outbox


def _drop(outbox: Outbox) -> None:
    with _outboxes_turn:
        for run_id in [key for key, value in _outboxes.items() if value is outbox]:
            del _outboxes[run_id]
    outbox.close()


def _begin(entry: Mapping[str, Any], own: str, *, may_wait: bool) -> Outbox:
    """Create a run, now or, where it may wait, when MLflow is there again; `own`: what it is called until then."""
    door = gate(tracking_uri())
    if not may_wait or door.passable():
        try:
            with asking(door, f"run {entry['name']!r}"):
                return _outbox_of(create(MlflowClient(tracking_uri=tracking_uri()), entry))
        except UnavailableError:
            if not may_wait:
                raise
    outbox = _outbox_of(own, began=False)
    outbox.put({"kind": "create", **entry})
    return outbox
