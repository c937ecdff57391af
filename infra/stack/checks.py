"""What the doctor looks at in a stack: its services, and the databases of the home."""

import tempfile
from pathlib import Path

from infra.finding import Check, Outcome, python
from infra.home import home, mlflow_database
from infra.stack import databases, health, leftovers, secrets, services, state

_OPEN_MLFLOW = """
import os
from mlflow import MlflowClient
print(len(MlflowClient(tracking_uri=os.environ["DEEPZERO_STORE"]).search_experiments()))
"""
_OPEN_PREFECT = """
import asyncio
from pathlib import Path
import prefect.server.database
import sqlalchemy
from alembic.script import ScriptDirectory
from prefect.server.database import provide_database_interface

folder = Path(prefect.server.database.__file__).parent / "_migrations"

async def main():
    database = provide_database_interface()
    engine = await database.engine()
    dialect = engine.dialect.name
    async with engine.connect() as connection:
        if dialect == "sqlite":
            said = (await connection.execute(sqlalchemy.text("PRAGMA quick_check(1)"))).scalar()
            if said != "ok":
                raise SystemExit(said)
        found = (await connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version"))).scalar()
    scripts = ScriptDirectory(str(folder), version_locations=[str(folder / "versions" / dialect)])
    known = {script.revision for script in scripts.walk_revisions()}
    print("current" if found in scripts.get_heads() else "older" if found in known else "unknown")

asyncio.run(main())
"""


def check_stack() -> list[Check]:
    """Whether a stack runs, whether all of it does, and whether one has left something behind."""
    base = home()
    stack = state.running(base)
    if stack is None:
        return [_check_remains(base)]
    lacking = [
        Check(f"stack {row.service}", "fail", f"{row.state}, and not well", f"deepzero logs {row.service}")
        for row in health.examine(stack)
        if not row.healthy
    ]
    return lacking or [Check("stack", "ok", f"{len(services.services(stack))} services, all well")]


def check_mlflow_store(install: str) -> list[Check]:
    """The MLflow store opens: that of the home or the variable, or a fresh one where there is none yet."""
    given, file = secrets.read(), mlflow_database(home())
    named = secrets.MLFLOW_DATABASE in given.values
    exists = named or file.is_file()
    with tempfile.TemporaryDirectory(prefix="deepzero-doctor-") as folder:
        fresh = f"sqlite:///{(Path(folder) / 'mlflow.db').as_posix()}"
        store = services.mlflow_store(home(), given.values) if exists else fresh
        result = _look(_OPEN_MLFLOW, {"DEEPZERO_STORE": store}, given, secrets.MLFLOW_DATABASE)
    where = f"that of ${secrets.MLFLOW_DATABASE}" if named else str(file) if exists else "a fresh store"
    if result.ok:
        return [Check("mlflow store", "ok", f"{where} opens")]
    mend = f"move {file} away to begin a new store, or, if it is older: mlflow db upgrade sqlite:///{file}"
    if named:
        mend = f"start it, mend ${secrets.MLFLOW_DATABASE}, or, if it is older: mlflow db upgrade ADDRESS"
    mend = mend if exists and not _is_broken(result) else install
    return [Check("mlflow store", "fail", f"{where} does not open: {given.hide(result.text)}", mend)]


def check_prefect_database(install: str) -> list[Check]:
    """Prefect's database opens, is intact, and has the schema of the version that is installed."""
    given, file = secrets.read(), databases.prefect_file(home())
    named = secrets.PREFECT_DATABASE in given.values
    if not named and not file.is_file():
        return [Check("prefect database", "ok", "none yet")]
    settings = services.prefect_database(given.values) or {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{file}"
    }
    result = _look(_OPEN_PREFECT, settings, given, secrets.PREFECT_DATABASE)
    where = f"that of ${secrets.PREFECT_DATABASE}" if named else str(file)
    if not result.ok:
        mend = f"start it, or mend ${secrets.PREFECT_DATABASE}" if named else f"move {file} away to begin a new one"
        mend = install if _is_broken(result) else mend
        return [Check("prefect database", "fail", f"{where} does not open: {given.hide(result.text)}", mend)]
    if result.text == "older":
        mend = "`deepzero up` brings it up to date"
        return [Check("prefect database", "warn", f"{where} has the schema of an earlier Prefect", mend)]
    if result.text == "unknown":
        return [Check("prefect database", "fail", f"{where} has the schema of a later Prefect", install)]
    return [Check("prefect database", "ok", f"{where} opens, its schema is the right one")]


def _look(code: str, settings: dict[str, str], given: secrets.Secrets, variable: str) -> Outcome:
    """What the code finds, once it is known that a PostgreSQL would answer it."""
    reason = databases.refusal(given.values[variable]) if variable in given.values else ""
    return Outcome(False, reason, reason) if reason else python(code, settings=settings)


def _is_broken(result: Outcome) -> bool:
    """Whether it was the installation that failed and not the database."""
    return result.text.startswith(("ImportError", "ModuleNotFoundError"))


def _check_remains(base: Path) -> Check:
    lost = leftovers.marked(base)
    if lost:
        mend = "`deepzero up` starts it anew, `deepzero down` ends them"
        return Check("stack", "fail", f"{len(lost)} of its processes are left without a supervisor", mend)
    if state.state_file(base).exists():
        found = f"{state.state_file(base)} tells of one that is gone"
        return Check("stack", "warn", found, "`deepzero up` starts it anew, `deepzero down` removes the file")
    return Check("stack", "ok", "not running")
