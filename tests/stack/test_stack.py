"""The whole stack: up, a run, every service killed, up again, down. One stack serves the module."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from stacks import Command, eventually, rows, well

from infra.stack import lost_runs
from infra.stack.secrets import Secrets
from infra.stack.state import recorded

pytestmark = pytest.mark.timeout(400)

SERVICES = ("prefect", "mlflow", "dask-scheduler", "dask-worker-1", "prefect-worker")


@pytest.fixture(scope="module")
def stack(module_home: Path) -> Iterator[Command]:
    """A stack with one Dask worker."""
    deepzero = Command(module_home, {})
    started = deepzero("up", "--workers", "1")
    try:
        assert started.returncode == 0, started.stderr
        yield deepzero
    finally:
        deepzero("down")
        for process in deepzero.processes():
            process.kill()


def places(deepzero: Command) -> dict[str, str]:
    """What `up` prints: name -> address."""
    return dict(re.findall(r"^(\w+) +(\S+)", deepzero("up").stdout, flags=re.MULTILINE))


def test_every_service_is_well(stack: Command) -> None:
    status = stack("status")
    assert status.returncode == 0, status.stdout
    assert tuple(rows(stack)) == SERVICES
    assert all(row["state"] in ("running", "starting") and row["pid"] for row in rows(stack).values())
    assert status.stdout.count("well") == len(SERVICES)


def test_the_pages_open(stack: Command) -> None:
    found = places(stack)
    for name in ("Prefect", "MLflow"):
        page = httpx.get(found[name], follow_redirects=True, timeout=30)
        assert page.status_code == 200
        assert "<html" in page.text
    assert httpx.get(f"{found['MLflow']}/", headers={"Host": "attacker.example"}, timeout=30).status_code == 403


def test_nothing_listens_beyond_this_machine(stack: Command) -> None:
    listening = [
        connection.laddr.ip
        for process in stack.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= len(SERVICES)
    assert set(listening) == {"127.0.0.1"}


def test_a_run_reports_to_the_stack(stack: Command) -> None:
    done = stack("run", "classify", "--config", "smoke")
    assert done.returncode == 0, done.stderr
    found = places(stack)
    assert f"MLflow run  {found['MLflow']}/#/experiments/" in done.stdout
    assert re.search(rf"^Prefect UI +{found['Prefect']}$", done.stdout, flags=re.MULTILINE)
    flow_runs = httpx.post(f"{found['Prefect']}/api/flow_runs/filter", json={}, timeout=30).json()
    assert [run["state_type"] for run in flow_runs] == ["COMPLETED"]
    (run_id,) = re.findall(r"/runs/([0-9a-f]{32})\?", done.stdout)
    api = f"{found['MLflow']}/api/2.0/mlflow"
    run = httpx.get(f"{api}/runs/get", params={"run_id": run_id}, timeout=30).json()["run"]
    assert run["info"]["status"] == "FINISHED"
    assert run["info"]["artifact_uri"].startswith(
        "mlflow-artifacts:/"
    )  # through the server, not a path of this machine
    files = httpx.get(f"{api}/artifacts/list", params={"run_id": run_id}, timeout=30).json()["files"]
    assert any((stack.home / "mlartifacts").rglob(Path(files[0]["path"]).name))


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_comes_back(stack: Command, service: str) -> None:
    eventually(lambda: well(stack), 120, "all is well before")
    pid = rows(stack)[service]["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: rows(stack)[service]["pid"] not in (pid, None) and well(stack), 120, f"{service} is well again")


def test_a_second_up_finds_the_first(stack: Command) -> None:
    eventually(lambda: well(stack), 120, "all is well before")
    before = rows(stack)
    again = stack("up", "--workers", "3")
    assert again.returncode == 0
    assert f"the stack of {stack.home} is running already\n" in again.stderr
    assert "its number of workers is 1, not 3: `deepzero down` first\n" in again.stderr
    assert {row["pid"] for row in rows(stack).values()} == {row["pid"] for row in before.values()}


def test_a_run_that_has_lost_its_process_does_not_stay_running(stack: Command) -> None:
    eventually(lambda: well(stack), 120, "all is well before")
    with httpx.Client(base_url=f"{places(stack)['Prefect']}/api/", timeout=30) as api:
        if api.get("work_pools/deepzero").status_code == 404:
            api.post("work_pools/", json={"name": "deepzero", "type": "process"}).raise_for_status()
        flow = api.post("flows/", json={"name": "lost"}).raise_for_status().json()["id"]
        deployment = {"name": "lost", "flow_id": flow, "work_pool_name": "deepzero"}
        made = api.post("deployments/", json=deployment).raise_for_status().json()["id"]
        running = {"state": {"type": "RUNNING", "name": "Running"}}
        run = api.post(f"deployments/{made}/create_flow_run", json=running).raise_for_status().json()["id"]
        found = recorded(stack.home)
        assert found is not None
        assert lost_runs.end(found, Secrets({}, ())) == 1
        assert api.get(f"flow_runs/{run}").json()["state"]["type"] == "CRASHED"
        assert lost_runs.end(found, Secrets({}, ())) == 0


def test_the_logs_can_be_read(stack: Command) -> None:
    shown = stack("logs", "dask-scheduler", "-n", "5")
    assert len(shown.stdout.splitlines()) == 5
    assert "distributed" in shown.stdout
    everything = stack("logs", "-n", "1").stdout
    assert {line.partition(":")[0] for line in everything.splitlines()} == {*SERVICES, "supervisord"}
    refused = stack("logs", "dask-schedule")
    assert refused.returncode == 2
    assert "dask-scheduler" in refused.stderr


def test_down_leaves_nothing_behind_even_without_its_supervisor(stack: Command) -> None:
    eventually(lambda: well(stack), 120, "all is well before")
    ports = json.loads((stack.home / "stack" / "state.json").read_text(encoding="utf-8"))["ports"]
    os.kill(int((stack.home / "stack" / "supervisord.pid").read_text(encoding="utf-8")), signal.SIGKILL)
    eventually(lambda: stack("status").returncode == 1, 30, "the loss is seen")
    assert "left without a supervisor" in stack("status").stdout
    assert len(stack.processes()) >= len(SERVICES)
    down = stack("down")
    assert down.returncode == 0, down.stderr
    assert stack.processes() == []
    for port in ports.values():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert stack("down").stdout == f"no stack was running in {stack.home}\n"
    status = stack("status")
    assert (status.returncode, status.stdout) == (1, f"{stack.home}: no stack is running; `deepzero up` starts one\n")
