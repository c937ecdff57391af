"""The doctor's look at the stack and its databases, on sound ones and on ones that are really damaged."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from stacks import Command

from deepzero_core.errors import RequestError
from infra.doctor import INSTALL
from infra.stack import checks, databases, leftovers, secrets, state
from infra.stack.state import Stack


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in secrets.variables():
        monkeypatch.delenv(name, raising=False)


def test_databases_are_made_once_and_looked_at(home: Path) -> None:
    state.folder(home).mkdir(parents=True)
    given = secrets.read()
    assert databases.initialise(home, given) == ["Prefect", "MLflow"]
    assert databases.initialise(home, given) == []
    (check,) = checks.check_prefect_database(INSTALL)
    assert (check.status, check.found) == ("ok", f"{databases.prefect_file(home)} opens, its schema is the right one")
    with sqlite3.connect(databases.prefect_file(home)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    connection.close()
    (check,) = checks.check_prefect_database(INSTALL)
    assert (check.status, check.mend) == ("fail", INSTALL)
    assert "schema of a later Prefect" in check.found
    databases.prefect_file(home).unlink()
    assert databases.initialise(home, given) == ["Prefect"]  # a file that is gone is made again


def test_a_damaged_prefect_database(home: Path) -> None:
    (check,) = checks.check_prefect_database(INSTALL)
    assert (check.status, check.found) == ("ok", "none yet")
    file = databases.prefect_file(home)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"this is no database" * 100)
    (check,) = checks.check_prefect_database(INSTALL)
    assert check.status == "fail"
    assert "file is not a database" in check.found
    assert check.mend == f"move {file} away to begin a new one"


def test_databases_that_do_not_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPZERO_MLFLOW_DATABASE", "postgresql://user:canary@127.0.0.1:1/none")
    monkeypatch.setenv("DEEPZERO_PREFECT_DATABASE", "postgresql://user:canary@127.0.0.1:1/none")
    for check in (*checks.check_mlflow_store(INSTALL), *checks.check_prefect_database(INSTALL)):
        assert check.status == "fail"
        assert "does not open" in check.found
        assert "Connection refused" in check.found
        assert "canary" not in check.found + check.mend
    with pytest.raises(RequestError, match=r"\$DEEPZERO_PREFECT_DATABASE names does not open: .*Connection refused"):
        databases.initialise(home, secrets.read())


def test_the_remains_of_a_stack(deepzero: Command) -> None:
    base = deepzero.home
    assert checks.check_stack()[0].found == "not running"
    state.folder(base).mkdir(parents=True)
    state.write(Stack(home=base, host="127.0.0.1", ports={}, workers=0, socket=state.socket_path(base)))
    (check,) = checks.check_stack()
    assert (check.status, "one that is gone" in check.found) == ("warn", True)


def test_processes_without_a_supervisor_are_found_and_ended(deepzero: Command) -> None:
    marks = {leftovers.VARIABLE: str(deepzero.home), leftovers.SERVICE: "mlflow"}
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    lost = subprocess.Popen(
        [sys.executable, "-c", deaf],
        env={**deepzero.environment, **marks},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert lost.stdout is not None
        lost.stdout.readline()
        (check,) = checks.check_stack()
        assert (check.status, check.found) == ("fail", "1 of its processes are left without a supervisor")
        assert [process.pid for process in leftovers.marked(deepzero.home, "mlflow")] == [lost.pid]
        assert leftovers.marked(deepzero.home, "prefect") == []
        assert leftovers.marked(deepzero.home.parent) == []
        leftovers.end(leftovers.marked(deepzero.home), grace_s=0.5)
        assert not psutil.pid_exists(lost.pid)
        assert leftovers.marked(deepzero.home) == []
    finally:
        lost.kill()
        lost.stdout.close()
