"""Canaries: secrets where a user puts them, and nowhere else afterwards, whether a run fails or succeeds.

The token of a scoring server, the password in the address of MLflow, the user and password of Prefect's server, the
password of a database. Looked for, plain, in base64 and as an address writes it, in everything below the home, in what
is printed, and in the stores of MLflow and Prefect.
"""

import base64
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch
from scoring import Handler, Server, listening

from benchmarks.faults.bench import Bench
from benchmarks.faults.processes import Home, copied, mlflow_server, prefect_server
from infra.hidden import hidden

pytestmark = pytest.mark.timeout(900)

NAMES = ("token", "mlflow", "prefect", "database")
TOKEN, MLFLOW, PREFECT, DATABASE = (f"canary-{name}-9f3a/+{name}" for name in NAMES)

CONFIG = """
name: secrets
data: {name: digits, batch_size: 16, train_limit: 64, test_limit: 16}
victim:
  kind: http
  cache: true
  settings: {url: "URL", token_env: SCORING_TOKEN, patience: 2, headers: {X-Team: blue}}
denoiser: {name: dncnn, depth: 3, width: 4}
pretraining: {steps: 2}
pruning: {method: uniform}
training: {method: deepzero, queries: 12, steps: 4, checkpoint_every: 2}
certification: {n0: 5, n: 20, examples: 2, batch_size: 20}
cluster: {workers: 0}
"""


def traces(secret: str) -> set[bytes]:
    """How a secret may be written."""
    plain = secret.encode()
    found = {plain, quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode(), repr(secret)[1:-1].encode()}
    for text in (plain, b"user:" + plain, b"Bearer " + plain):
        for skipped in range(3):  # base64 of a text that begins at any of three places
            encoded = base64.b64encode(b"x" * skipped + text + b"xxx")
            found.add(encoded[4:-8])
    return found


def leaks(text: bytes) -> list[str]:
    secrets = {"token": TOKEN, "mlflow": MLFLOW, "prefect": PREFECT, "database": DATABASE}
    return [name for name, secret in secrets.items() if any(trace in text for trace in traces(secret))]


def leaks_below(*folders: Path) -> list[str]:
    """Files that hold a secret. A database is read file by file, and row by row, for its pages may cut a text."""
    found = []
    for file in sorted(file for folder in folders for file in folder.rglob("*") if file.is_file()):
        found += [f"{file}: {name}" for name in leaks(file.read_bytes())]
        if file.suffix == ".db":
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
                found += [f"{file}, dumped: {name}" for name in leaks("\n".join(database.iterdump()).encode())]
    return found


class Scoring(list[Any]):
    """The replies of a server that scores digits and, asked with the right token, answers; `broken`: it says 500."""

    broken = False

    def pop(self, _: Any = 0) -> Any:
        return self._reply

    def __bool__(self) -> bool:
        return True

    def _reply(self, handler: Handler, body: bytes) -> None:
        given = handler.headers.get("Authorization", "")
        if given != f"Bearer {TOKEN}":
            handler.send(401, b"who are you?")
        elif self.broken:  # as a proxy does that shows the request it could not pass on
            handler.send(400, f"could not pass on: Authorization: {given}".encode())
        else:
            pixels = torch.tensor(json.loads(body)["inputs"]).flatten(1)
            handler.send(200, json.dumps({"predictions": pixels[:, :10].tolist()}).encode())


@pytest.fixture(scope="module")
def scoring() -> Iterator[Server]:
    with listening() as server:
        server.script = Scoring()
        yield server


def test_no_secret_is_left_anywhere(tmp_path: Path, scoring: Server, faults_bench: Bench) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "prefect").mkdir()
    tracking, address = mlflow_server(tmp_path / "mlflow")
    flows, api = prefect_server(tmp_path / "prefect")
    flows.variables["PREFECT_SERVER_API_AUTH_STRING"] = f"admin:{PREFECT}"
    flows.ready = lambda: _status(f"{api}/health", f"admin:{PREFECT}") == 200
    file = tmp_path / "secrets.yaml"
    file.write_text(CONFIG.replace("URL", scoring.url))
    home: Home | None = None
    try:
        tracking.start()
        flows.start()
        assert _status(f"{api}/flows/count", "admin:wrong", post=True) == 401, "the server asks for it"
        home = copied(
            faults_bench.template,
            tmp_path / "home",
            store=address.replace("http://", f"http://somebody:{quote(MLFLOW, safe='')}@"),
            variables={
                "PREFECT_API_URL": api,
                "PREFECT_API_AUTH_STRING": f"admin:{PREFECT}",
                "SCORING_TOKEN": TOKEN,
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://somebody:{DATABASE}@127.0.0.1:9/prefect",
            },
        )
        run = ["run", "defend", "--config", str(file)]
        scoring.script.broken = True  # type: ignore[attr-defined]
        failed = home.start(*run)
        assert failed.wait() == 2, failed.errors
        assert re.search(r"^error: the black box .*", failed.errors, re.M), failed.errors
        scoring.script.broken = False  # type: ignore[attr-defined]
        succeeded = home.done(*run)
        asked = scoring.requests
        assert any(headers.get("Authorization") == f"Bearer {TOKEN}" for _, headers, _ in asked), "it was used"
        home.done("report")
        statuses = {run.info.status for run in _runs(tmp_path / "mlflow" / "mlflow.db")}
        assert statuses == {"FAILED", "FINISHED"}
        assert succeeded.said
    finally:
        for server in (tracking, flows):
            server.kill()
        if home is not None:
            home.close()
    assert len(list(tmp_path.rglob("*.db"))) >= 2, "there are stores to look into"
    assert leaks_below(tmp_path) == []


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    for number, trace in enumerate(sorted(traces(TOKEN))):
        (tmp_path / f"{number}.txt").write_bytes(b"something " + trace + b" else")
    assert len(leaks_below(tmp_path)) == len(traces(TOKEN))
    assert leaks(base64.b64encode(f"somebody:{PREFECT}".encode())) == ["prefect"]
    database = tmp_path / "one.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE logs (message TEXT)")
        connection.execute("INSERT INTO logs VALUES (?)", ("x" * 5000 + DATABASE,))
    connection.close()
    assert any("dumped: database" in leak for leak in leaks_below(tmp_path))


@pytest.mark.parametrize(
    "uri", [f"postgresql://somebody:{quote(DATABASE, safe='')}@127.0.0.1:9/mlflow", f"http://somebody:{DATABASE}@[::1"]
)
def test_a_password_in_an_address_that_does_not_open_is_not_shown(
    home: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    from deepzero_core.errors import RequestError
    from tasks.tracking import initialise

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(RequestError) as caught:
        initialise("secret")
    assert leaks(str(caught.value).encode()) == []
    assert "MLFLOW_TRACKING_URI=" in str(caught.value) and "somebody:…@" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("API request to http://me:pa%20ss@host:5000/api failed", "API request to http://me:…@host:5000/api failed"),
        (
            "postgresql+psycopg2://u:p/w#1@db/mlflow, and https://a:b@c",
            "postgresql+psycopg2://u:…@db/mlflow, and https://a:…@c",
        ),
        ("http://127.0.0.1:5000/a, me@host:22", "http://127.0.0.1:5000/a, me@host:22"),
        ("nothing to hide: 1 @ 2", "nothing to hide: 1 @ 2"),
    ],
)
def test_passwords_in_addresses_are_hidden(text: str, expected: str) -> None:
    assert hidden(text) == expected


def test_errors_of_other_libraries_are_told_without_the_password() -> None:
    from mlflow.exceptions import MlflowException

    from tasks.tracking_store import one_line

    error = MlflowException(f"API request to http://somebody:{quote(MLFLOW, safe='')}@127.0.0.1:9/api failed")
    assert leaks(one_line(error).encode()) == []


def _status(url: str, auth: str, *, post: bool = False) -> int:
    user, _, password = auth.partition(":")
    try:
        return httpx.request("POST" if post else "GET", url, auth=(user, password), timeout=5).status_code
    except httpx.HTTPError:
        return 0


def _runs(database: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiments = [found.experiment_id for found in client.search_experiments() if found.name == "secrets"]
    return list(client.search_runs(experiments))
