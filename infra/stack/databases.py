"""The databases of the servers, made ready before any server starts: two processes that meet a fresh one would both
create its tables."""

import concurrent.futures
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from deepzero_core.errors import RequestError, WorkError
from infra.finding import last_line, one_line
from infra.home import mlflow_database
from infra.orchestration import SETTINGS
from infra.stack import secrets, services
from infra.stack.secrets import Secrets
from infra.stack.state import folder

_TIMEOUT_S = 300
_CONNECT_S = 10
_OPEN_MLFLOW = """
import logging, os
for chatty in ("mlflow.store.db.utils", "alembic"):
    logging.getLogger(chatty).setLevel(logging.ERROR)
from mlflow import MlflowClient
MlflowClient(tracking_uri=os.environ["STORE"]).search_experiments(max_results=1)
"""


def initialise(base: Path, given: Secrets) -> list[str]:
    """Create or migrate what this version of the servers has not seen yet; the names of the databases made ready.

    Raises:
        RequestError: a database that the user named does not open.
        WorkError: one of the home's own does not.
    """
    for variable in (secrets.PREFECT_DATABASE, secrets.MLFLOW_DATABASE):
        if variable in given.values and (reason := refusal(given.values[variable])):
            raise RequestError(f"the database that ${variable} names does not open: {given.hide(reason)}")
    wanted = {"Prefect": _prefect_mark(base, given.values), "MLflow": _mlflow_mark(base, given.values)}
    done = _done(base)
    missing = [name for name, mark in wanted.items() if done.get(name) != mark]
    makers = {"Prefect": _prefect, "MLflow": _mlflow}
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        for future in [pool.submit(makers[name], base, given) for name in missing]:
            future.result()
    # The files are there now.
    wanted = {"Prefect": _prefect_mark(base, given.values), "MLflow": _mlflow_mark(base, given.values)}
    _file(base).write_text(json.dumps(wanted, indent=2), encoding="utf-8")
    return missing


def prefect_file(base: Path) -> Path:
    """Prefect's own database, where no PostgreSQL is named."""
    return base / "prefect" / "prefect.db"


def refusal(url: str) -> str:
    """Why a PostgreSQL lets nobody in, or nothing; MLflow would try again and again before it said so.

    Raises:
        RequestError: the package that speaks to PostgreSQL is not installed.
    """
    try:
        import psycopg2
    except ImportError as error:
        raise RequestError("PostgreSQL needs a package: pip install -c constraints.txt -e '.[postgres]'") from error
    try:
        psycopg2.connect(services.with_driver(url, ""), connect_timeout=_CONNECT_S).close()
    except psycopg2.Error as error:
        return one_line(str(error))
    return ""


def _prefect(base: Path, given: Secrets) -> None:
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    settings = {**SETTINGS, "PREFECT_HOME": str(base / "prefect"), **services.prefect_database(given.values)}
    _run(command, settings, given, secrets.PREFECT_DATABASE, str(prefect_file(base)))


def _mlflow(base: Path, given: Secrets) -> None:
    settings = {"STORE": services.mlflow_store(base, given.values), "MLFLOW_DISABLE_TELEMETRY": "true"}
    lock = base / "mlflow.lock"
    try:
        with FileLock(lock, timeout=_TIMEOUT_S):
            _run(
                [sys.executable, "-c", _OPEN_MLFLOW],
                settings,
                given,
                secrets.MLFLOW_DATABASE,
                str(mlflow_database(base)),
            )
    except Timeout:
        raise WorkError(f"another process has kept {lock} locked for {_TIMEOUT_S} s") from None


def _run(command: list[str], settings: Mapping[str, str], given: Secrets, variable: str, file: str) -> None:
    hidden = {*secrets.variables(), "PREFECT_API_URL", "PREFECT_PROFILE"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | dict(settings)
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise WorkError(f"the database {file} was not ready within {_TIMEOUT_S} s") from None
    if done.returncode == 0:
        return
    reason = given.hide(last_line(done.stderr or done.stdout) or f"status {done.returncode}")
    if variable in given.values:
        raise RequestError(f"the database that ${variable} names does not open: {reason}")
    raise WorkError(f"the database {file} does not open: {reason}; `deepzero doctor` tells more")


def _prefect_mark(base: Path, values: Mapping[str, str]) -> str:
    return _mark("prefect", prefect_file(base), values.get(secrets.PREFECT_DATABASE))


def _mlflow_mark(base: Path, values: Mapping[str, str]) -> str:
    return _mark("mlflow", mlflow_database(base), values.get(secrets.MLFLOW_DATABASE))


def _mark(package: str, file: Path, url: str | None) -> str:
    """What a database that is ready looks like from here: the version that made it so, and which file it is."""
    place = url.rpartition("@")[2] if url else f"{file.name} {file.stat().st_ino if file.is_file() else 'absent'}"
    return f"{package} {importlib.metadata.version(package)} {place}"


def _done(base: Path) -> dict[str, str]:
    try:
        entries = json.loads(_file(base).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _file(base: Path) -> Path:
    return folder(base) / "databases.json"
