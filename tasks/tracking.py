"""Runs in MLflow: opened once, written in batches, ended honestly.

Every call names its run: nothing here touches MLflow's thread-local active run, so runs of several threads and stages
do not mix. The store is `$MLFLOW_TRACKING_URI` where that is set, else a SQLite file below deepzero's home.

A process that is killed cannot end its runs. They carry the process's id and starting time, and the next `initialise`
on the same machine ends what no living process owns.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput, Metric, Param, RunTag

from deepzero_core.errors import RequestError, WorkError
from tasks.environment import environment, git_state
from tasks.tracking_store import (
    REASON,
    STORE_ERRORS,
    initialise,
    one_line,
    owner,
    recording,
    run_url,
    tracking_uri,
    ui_command,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Run", "environment", "initialise", "metrics_of", "run_url", "tracking_uri", "ui_command"]

_log = logging.getLogger(__name__)

# Limits of MLflow on one request and one value.
METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
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
_EVALUATION_METRICS = {"test_accuracy": ("test/accuracy", 1.0), "test_loss": ("test/loss", 1.0)}


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

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str, *, last_steps: dict[str, int]) -> None:
        """Use `start` or `resume`."""
        self.experiment_id = experiment_id
        self.run_id = run_id
        self._client = client
        self._last_steps = last_steps
        self._points: list[Metric] = []
        self._flushed = time.monotonic()
        self._ended = False

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

        Raises:
            WorkError: MLflow did not take it.
        """
        commit, dirty = git_state(Path(__file__).resolve().parent.parent)
        standard = {
            **owner(),
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
        with recording(f"run {name!r}"):
            client = MlflowClient(tracking_uri=tracking_uri())
            created = client.create_run(experiment_id, run_name=name, tags={**given, **standard})
        run = cls(client, experiment_id, created.info.run_id, last_steps={})
        run.params(params or {})
        return run

    @classmethod
    def resume(cls, run_id: str) -> Self:
        """Go on with a run that this or another process began.

        Steps that it has recorded are not recorded again: a trainer that goes back to its last checkpoint repeats them.

        Raises:
            RequestError: there is no such run.
        """
        client = MlflowClient(tracking_uri=tracking_uri())
        try:
            found = client.get_run(run_id)
        except STORE_ERRORS as error:
            raise RequestError(f"MLflow run {run_id} cannot be resumed: {one_line(error)}") from error
        with recording(f"the resumption of run {run_id}"):
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in owner().items()])
            if REASON in found.data.tags:
                client.delete_tag(run_id, REASON)
            last = {key: max(p.step for p in client.get_metric_history(run_id, key)) for key in found.data.metrics}
        return cls(client, found.info.experiment_id, run_id, last_steps=last)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step. They are sent in batches, every few seconds or when `flush` is called.

        A store that does not answer in the meantime costs nothing: the numbers wait for the next attempt.
        """
        now = int(time.time() * 1000)
        self._points += [
            Metric(key, float(value), now, step)
            for key, value in values.items()
            if step > self._last_steps.get(key, step - 1)
        ]
        if len(self._points) >= _FLUSH_POINTS or time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            try:
                self.flush()
            except WorkError as error:
                _log.warning("%s; metrics that wait for the next attempt: %d", error, len(self._points))

    def flush(self) -> None:
        """Send what waits. WorkError when MLflow does not take it; it then waits on."""
        self._flushed = time.monotonic()
        while self._points:
            batch = self._points[:METRICS_PER_BATCH]
            with recording(f"{len(batch)} metrics"):
                self._client.log_batch(self.run_id, metrics=batch)
            del self._points[: len(batch)]

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags."""
        tags = [RunTag(key, str(value)[:_TAG_CHARACTERS]) for key, value in values.items()]
        with recording("tags"):
            self._client.log_batch(self.run_id, tags=tags)

    def params(self, params: Mapping[str, object]) -> None:
        """Record settings, as `start` does."""
        flat = dict(_flattened(params))
        logged = [Param(key, _shortened(value)) for key, value in flat.items()]
        with recording("parameters"):
            for start in range(0, len(logged), _PARAMS_PER_BATCH):
                self._client.log_batch(self.run_id, params=logged[start : start + _PARAMS_PER_BATCH])
        if any(len(value) > _PARAM_CHARACTERS for value in flat.values()):
            self.text(json.dumps(params, indent=2, default=str), "config/params.json")

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or what a folder holds, into the run's artifacts, below `folder`."""
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        with recording(f"artifact {path}"):
            log(self.run_id, str(path), folder)

    def text(self, text: str, name: str) -> None:
        """Write an artifact `name`, such as config/experiment.yaml."""
        with recording(f"artifact {name}"):
            self._client.log_text(self.run_id, text, name)

    def dataset(self, name: str, digest: str, facts: Mapping[str, object]) -> None:
        """Show the data that the run reads; `facts`, such as counts and licence, are shown with it."""
        profile, source = json.dumps(facts, default=str), json.dumps({"name": name})
        # MLflow takes 36 characters of a digest.
        dataset = Dataset(name=name, digest=digest[:36], source_type="deepzero", source=source, profile=profile)
        with recording(f"data set {name!r}"):
            self._client.log_inputs(
                self.run_id, datasets=[DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])]
            )

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

        Raises:
            WorkError: MLflow did not take it; and whatever `save` raises.
        """
        with tempfile.TemporaryDirectory(prefix="deepzero-model-") as temporary, recording(f"model {name!r}"):
            logged = self._client.create_logged_model(self.experiment_id, name=name, source_run_id=self.run_id)
            status: Literal["READY", "FAILED"] = "FAILED"
            try:
                path = Path(temporary) / "model"
                save(path, logged)
                self._client.log_model_artifacts(logged.model_id, str(path))
                self._client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])
                status = "READY"
            finally:
                self._client.finalize_logged_model(logged.model_id, status)
        return str(logged.model_uri)

    def end(self, status: str = "FINISHED", reason: str | None = None) -> None:
        """Send what waits and end the run as FINISHED, FAILED or KILLED; ending it again does nothing."""
        if self._ended:
            return
        if reason is not None:
            self.tags({REASON: reason})
        self.flush()
        with recording(f"the end of run {self.run_id}"):
            self._client.set_terminated(self.run_id, status)
        self._ended = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
            return
        # What ends a process (KeyboardInterrupt, SystemExit, Prefect's TerminationSignal) is no Exception.
        try:
            self.end("FAILED" if isinstance(error, Exception) else "KILLED", reason=one_line(error))
        except WorkError as second:
            _log.warning("%s", second)  # the first error is the one to be told


def _flattened(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _shortened(value: str) -> str:
    return value if len(value) <= _PARAM_CHARACTERS else f"{value[: _PARAM_CHARACTERS - 1]}…"
