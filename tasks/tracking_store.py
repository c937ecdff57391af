"""The MLflow store: where it is, how it is opened by many processes, and what killed ones leave behind in it."""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import psutil
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from deepzero_core.errors import DeepZeroError, RequestError, WorkError
from infra.hidden import hidden
from infra.home import home, mlflow_artifacts, mlflow_database
from infra.stack.state import joined
from tasks import gate
from tasks.environment import host

T = TypeVar("T")

VARIABLE = "MLFLOW_TRACKING_URI"
UI = "http://127.0.0.1:5000"
PID, STARTED, HOST, REASON = "deepzero.pid", "deepzero.process_started", "deepzero.host", "deepzero.reason"
STORE_ERRORS = (MlflowException, SQLAlchemyError, OSError)

_LOCK_SECONDS = 120.0
# Between the starting times of one process read at two moments (they are derived from the time since boot).
_CLOCK_TOLERANCE_S = 2.0
# Without the first, the pages of MLflow open as those of a language-model application.
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "Networks trained by deepzero. Each flow is a run; its stages are the runs below it.",
}


def tracking_uri() -> str:
    """Where runs are kept: $MLFLOW_TRACKING_URI, the stack that runs, or the home's own file."""
    if given := os.environ.get(VARIABLE):
        return given
    stack = joined(home())
    return stack.mlflow_url if stack else f"sqlite:///{mlflow_database(home()).as_posix()}"


def store_exists() -> bool:
    """Whether there can be runs: a server and the user's own store are there, ours may not have been made yet."""
    return bool(os.environ.get(VARIABLE)) or mlflow_database(home()).exists()


def initialise(name: str) -> str:
    """Make the store ready, tell it what earlier runs could not, end what killed processes left running, and return the
    id of experiment `name`.

    To be called once, by the process that starts the others: processes that meet a fresh SQLite store at the same time
    die in its migrations. A lock file makes several such calls harmless.

    Raises:
        RequestError: the store that the user named does not open.
        WorkError: deepzero's own store does not open, or another process keeps it locked.
    """

    def opened(client: MlflowClient) -> str:
        experiment = _experiment(client, name)
        _tidied(client)
        return experiment

    return with_store(opened)


def tidy() -> None:
    """Tell the store what runs could not, and end what killed processes left running; errors as `initialise`."""
    with_store(_tidied)


def _tidied(client: MlflowClient) -> None:
    from tasks.waiting import deliver_waiting  # which needs this module

    deliver_waiting()
    _reap(client)


def with_store(use: Callable[[MlflowClient], T]) -> T:
    """Make the store ready and do something with it that no other process of this home does meanwhile.

    Raises:
        RequestError, WorkError: see `initialise`.
    """
    gate.configure()
    for chatty in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    uri, base = tracking_uri(), home()
    try:
        probe(uri)
        base.mkdir(parents=True, exist_ok=True)
        if not os.environ.get(VARIABLE):
            mlflow_database(base).parent.mkdir(parents=True, exist_ok=True)
        with FileLock(base / "mlflow.lock", timeout=_LOCK_SECONDS):
            return use(MlflowClient(tracking_uri=uri))
    except Timeout:
        raise WorkError(f"another process has kept {base / 'mlflow.lock'} locked for {_LOCK_SECONDS:.0f} s") from None
    except STORE_ERRORS as error:
        kind = RequestError if os.environ.get(VARIABLE) else WorkError
        where = f"{VARIABLE}={without_password(uri)}" if kind is RequestError else f"the MLflow store {uri}"
        raise kind(f"{where} does not open: {one_line(error)}; `deepzero doctor` tells more") from error


def ui_command() -> str | None:
    """The command line that shows the runs in a browser; None where $MLFLOW_TRACKING_URI is a server that does."""
    uri = tracking_uri()
    if uri.startswith(gate.REMOTE):
        return None
    address = urlsplit(UI)
    options = {
        "--backend-store-uri": uri,
        "--artifacts-destination": mlflow_artifacts(home()).as_uri(),
        "--host": str(address.hostname),
        "--port": str(address.port),
        "--workers": "1",
    }
    return shlex.join([sys.executable, "-m", "mlflow", "server", *(part for pair in options.items() for part in pair)])


def run_url(experiment_id: str, run_id: str) -> str:
    """The run's page, once `ui_command` runs, among the pages for models and not those for language applications."""
    uri = tracking_uri()
    server = _without_user(uri).rstrip("/") if uri.startswith(gate.REMOTE) else UI
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def artifact_url(run_id: str, path: str) -> str | None:
    """Where a browser finds an artifact of a run; None where no MLflow server keeps it."""
    uri = tracking_uri()
    if not uri.startswith(gate.REMOTE):
        return None
    return f"{_without_user(uri).rstrip('/')}/get-artifact?{urlencode({'path': path, 'run_uuid': run_id})}"


def one_line(error: BaseException) -> str:
    """The error as the one line that fits into a tag or a message."""
    text = hidden(" ".join(str(error).split()))
    if isinstance(error, DeepZeroError) and text:
        return text[:500]
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    # A server has a place of its own; a database without one would put artifacts into the working directory.
    place = None if tracking_uri().startswith(gate.REMOTE) else mlflow_artifacts(home()).as_uri()
    return str(client.create_experiment(name, artifact_location=place, tags=_EXPERIMENT_TAGS))


def _reap(client: MlflowClient) -> None:
    """End, as KILLED, the runs of this machine whose process is gone."""
    experiments = [experiment.experiment_id for experiment in _pages(client.search_experiments)]
    mine = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{host()}'"
    search = {"experiment_ids": experiments, "filter_string": mine, "run_view_type": ViewType.ACTIVE_ONLY}
    # All of them first: ending one changes what the next page would be.
    for run in list(_pages(client.search_runs, **search)):
        pid, started = run.data.tags.get(PID, ""), run.data.tags.get(STARTED, "")
        if not _alive(pid, started):
            client.set_tag(run.info.run_id, REASON, f"process {pid} was gone without having ended this run")
            client.set_terminated(run.info.run_id, "KILLED")


def _pages(search: Any, **arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def owner() -> dict[str, str]:
    """Tags that say which process a run belongs to."""
    process = psutil.Process()
    return {PID: str(process.pid), STARTED: f"{process.create_time():.2f}", HOST: host()}


def _alive(pid: str, started: str) -> bool:
    """Whether that very process runs: its number may have been given to another one since."""
    try:
        process = psutil.Process(int(pid))
        return (
            abs(process.create_time() - float(started)) < _CLOCK_TOLERANCE_S
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


def probe(uri: str) -> None:
    """OSError at once where nobody listens; MLflow itself would try again for minutes."""
    gate.knock(uri, timeout_s=10)


def without_password(uri: str) -> str:
    return hidden(uri)


def _without_user(uri: str) -> str:
    """An address that may be shown: user and password stay out of pages, results and logs."""
    address = urlsplit(uri)
    return uri.replace(f"{address.netloc.rpartition('@')[0]}@", "", 1) if "@" in address.netloc else uri
