"""A stack that others can reach: accounts, TLS, PostgreSQL below both servers, secrets that stay where they belong."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from stacks import Command, Postgres

from deepzero_core.errors import WorkError
from infra.stack import lifecycle, secrets, state

pytestmark = pytest.mark.timeout(400)

PREFECT = "operator:canary-of-prefect-19c2"
MLFLOW = ("operator", "canary-of-mlflow-55d0")
KEY = "canary-of-the-session-key-e81b"


@dataclass(frozen=True)
class Exposed:
    """secrets: everything that must not be seen anywhere."""

    deepzero: Command
    database: Postgres
    secrets: tuple[str, ...]
    said: str

    @property
    def ports(self) -> dict[str, int]:
        state = (self.deepzero.home / "stack" / "state.json").read_text(encoding="utf-8")
        return dict(json.loads(state)["ports"])

    def get(self, service: str, path: str, auth: tuple[str, str] | None = None) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.ports[service]}{path}", auth=auth, timeout=30, follow_redirects=True)


@pytest.fixture(scope="module")
def exposed(module_home: Path, postgres: Postgres, certificates: dict[str, str]) -> Iterator[Exposed]:
    """Bound to every address of the machine; half of the secrets come as variables, half in files."""
    for database in ("prefect", "mlflow"):
        postgres.run("createdb", "-h", "127.0.0.1", "-p", str(postgres.port), "-U", "deepzero", database)
    files = {"MLFLOW_TRACKING_PASSWORD": MLFLOW[1], "DEEPZERO_MLFLOW_DATABASE": postgres.url("mlflow")}
    folder = module_home.parent / "secrets"
    folder.mkdir(mode=0o700)
    for name, secret in files.items():
        (folder / name).write_text(f"{secret}\n", encoding="utf-8")
    settings = {
        "PREFECT_SERVER_API_AUTH_STRING": PREFECT,
        "MLFLOW_TRACKING_USERNAME": MLFLOW[0],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": KEY,
        "DEEPZERO_PREFECT_DATABASE": postgres.url("prefect"),
        **{f"{name}_FILE": str(folder / name) for name in files},
        **certificates,
    }
    deepzero = Command(module_home, settings)
    started = deepzero("up", "--workers", "1", "--host", "0.0.0.0")
    try:
        assert started.returncode == 0, started.stderr
        hidden = (PREFECT, MLFLOW[1], KEY, postgres.password)
        yield Exposed(deepzero, postgres, hidden, started.stdout + started.stderr)
    finally:
        deepzero("down")
        for process in deepzero.processes():
            process.kill()


def test_prefect_asks_for_a_password(exposed: Exposed) -> None:
    user, password = PREFECT.split(":")
    assert exposed.get("prefect", "/api/admin/version").status_code == 401
    assert exposed.get("prefect", "/api/admin/version", ("operator", "wrong")).status_code == 401
    assert exposed.get("prefect", "/api/admin/version", (user, password)).status_code == 200


def test_mlflow_asks_for_a_password(exposed: Exposed) -> None:
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert exposed.get("mlflow", search).status_code == 401
    assert exposed.get("mlflow", search, ("operator", "wrong-wrong-wrong")).status_code == 401
    assert exposed.get("mlflow", search, MLFLOW).status_code == 200


def test_an_account_with_another_password_is_told(exposed: Exposed) -> None:
    stack = state.recorded(exposed.deepzero.home)
    assert stack is not None
    given = {secrets.MLFLOW_USER: MLFLOW[0], secrets.MLFLOW_PASSWORD: MLFLOW[1], secrets.MLFLOW_KEY: KEY}
    lifecycle.try_account(stack, secrets.Secrets(given, ()))
    with pytest.raises(WorkError, match="the account was made with another password"):
        lifecycle.try_account(stack, secrets.Secrets({**given, secrets.MLFLOW_PASSWORD: "another-password"}, ()))


def test_dask_speaks_tls_only(exposed: Exposed, certificates: dict[str, str]) -> None:
    asked = (
        "import os, sys\n"
        "from distributed import Client\n"
        "from distributed.security import Security\n"
        "ca, cert, key = sys.argv[2:]\n"
        "security = Security(tls_ca_file=ca, tls_client_cert=cert, tls_client_key=key, require_encryption=True)\n"
        "with Client(sys.argv[1], security=security, timeout=20) as client:\n"
        "    print(client.submit(sum, [1, 2, 3]).result(timeout=20))\n"
    )
    address = f"tls://127.0.0.1:{exposed.ports['dask']}"
    done = subprocess.run(
        [sys.executable, "-c", asked, address, *certificates.values()], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "6\n", done.stderr
    plain = "import sys\nfrom distributed import Client\nClient(sys.argv[1], timeout=5)\n"
    refused = subprocess.run(
        [sys.executable, "-c", plain, address.replace("tls:", "tcp:")], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0


def test_what_knows_no_password_stays_on_loopback(exposed: Exposed) -> None:
    addresses = {
        connection.laddr.port: connection.laddr.ip
        for process in exposed.deepzero.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {name: addresses[port] for name, port in exposed.ports.items()} == {
        "prefect": "0.0.0.0",
        "mlflow": "0.0.0.0",
        "dask": "0.0.0.0",
        "dashboard": "127.0.0.1",
        "worker": "127.0.0.1",
    }


def test_a_run_reaches_both_databases(exposed: Exposed) -> None:
    done = exposed.deepzero("run", "classify", "--config", "smoke")
    assert done.returncode == 0, done.stderr
    assert _count(exposed, "prefect", "select count(*) from flow_run where state_type = 'COMPLETED'") == 1
    assert _count(exposed, "mlflow", "select count(*) from metrics") > 0
    assert not (exposed.deepzero.home / "mlflow.db").exists()
    assert not (exposed.deepzero.home / "prefect" / "prefect.db").exists()


def test_no_secret_is_on_a_command_line_in_a_log_or_in_a_file(exposed: Exposed) -> None:
    said = exposed.said + exposed.deepzero("logs", "-n", "100000").stdout + exposed.deepzero("status").stdout
    lines = [" ".join(process.cmdline()) for process in exposed.deepzero.processes()]
    assert len(lines) >= 6
    files = [path for path in exposed.deepzero.home.rglob("*") if path.is_file()]
    assert exposed.deepzero.home / "stack" / "state.json" in files
    for secret in exposed.secrets:
        assert secret not in said
        assert [line for line in lines if secret in line] == []
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_each_service_knows_its_own_secrets_only(exposed: Exposed) -> None:
    known = {}
    for process in exposed.deepzero.processes():
        environment = process.environ()
        service = environment.get("DEEPZERO_STACK_SERVICE", "")
        known[service] = {secret for secret in exposed.secrets if any(secret in v for v in environment.values())}
    password = exposed.database.password
    assert known["prefect"] == {PREFECT, password}
    assert known["mlflow"] == {MLFLOW[1], KEY, password}
    assert known["prefect-worker"] == {PREFECT, MLFLOW[1]}
    assert known["dask-scheduler"] == known["dask-worker-1"] == set()


def test_down_ends_in_order(exposed: Exposed) -> None:
    down = exposed.deepzero("down")
    assert down.returncode == 0, down.stderr
    assert re.search("^the stack of .* is down$", down.stdout)
    assert exposed.deepzero.processes() == []
    log = (exposed.deepzero.home / "stack" / "logs" / "supervisord.log").read_text(encoding="utf-8")
    ended = re.findall(r"stopped: ([\w-]+) \((.*)\)", log)
    assert [name for name, _ in ended] == ["prefect-worker", "dask-worker-1", "dask-scheduler", "mlflow", "prefect"]
    assert not any("SIGKILL" in how for _, how in ended)


def _count(exposed: Exposed, database: str, query: str) -> int:
    address = ("-h", "127.0.0.1", "-p", str(exposed.database.port), "-U", "deepzero")
    return int(exposed.database.run("psql", *address, "-At", "-c", query, database).stdout)
