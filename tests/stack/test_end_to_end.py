"""From `up` to `down` as a user goes: a deployment is triggered, what it runs on is killed, and the result is there."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from stacks import Command, asked, eventually, rows, well

pytestmark = pytest.mark.timeout(900)

STEPS = 600
CONFIG = f"""
name: end-to-end
data: {{name: digits, batch_size: 64, train_limit: 256, test_limit: 64, crop_padding: 1}}
model: {{name: cnn, depth: 2, width: 6}}
pruning: {{method: random, sparsity: 0.3}}
training:
  epochs: 200
  steps: {STEPS}
  schedule: {{warmup_epochs: 1}}
  checkpoint_every: 5
cluster: {{timeout_s: 200}}
"""
# What the button Retry on the page of a run sends.
RETRY = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": False}


def step(home: Path) -> int:
    """That of the newest checkpoint of the training."""
    return max((int(path.stem.partition("-")[2]) for path in home.glob("stages/train/*/checkpoints/*.ckpt")), default=0)


def digest(home: Path) -> str:
    (record,) = home.glob("stages/train/*/record.json")
    return str(json.loads(record.read_text(encoding="utf-8"))["record"]["weights_digest"])


def flow_process(deepzero: Command) -> psutil.Process:
    (found,) = [each for each in deepzero.processes() if "prefect.engine" in " ".join(each.cmdline())]
    return found


@pytest.fixture
def watched(module_home: Path) -> Any:
    """Starts a command of a home whose output goes to a file; killed at the end if it still runs."""
    started = []

    def start(deepzero: Command, *arguments: str) -> tuple["subprocess.Popen[bytes]", Callable[[], str]]:
        log = module_home.parent / f"log-{len(started)}"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "flows.cli", *arguments]
            process = subprocess.Popen(command, env=deepzero.environment, stdout=file, stderr=subprocess.STDOUT)
        started.append(process)
        return process, lambda: log.read_text(errors="replace")

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_triggered_killed_retried_done(module_home: Path, watched: Any) -> None:
    config = module_home.parent / "config.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    deepzero, alone = Command(module_home, {}), Command(module_home.parent / "alone", {})
    try:
        up = deepzero("up", "--workers", "1")
        assert up.returncode == 0, up.stderr
        pages = dict(line.split()[:2] for line in up.stdout.splitlines() if "http://" in line)

        api, mlflow = f"{pages['Prefect']}/api", f"{pages['MLflow']}/api/2.0/mlflow"

        def goes_on() -> None:
            at = step(module_home)
            eventually(lambda: step(module_home) > at or state() != "RUNNING", 240, "the training goes on")
            assert state() == "RUNNING", f"{run()['state']['message']}\n{said()}"
            assert step(module_home) < STEPS

        def run() -> dict[str, Any]:
            (found,) = asked("POST", f"{api}/flow_runs/filter", {})
            return dict(found)

        def state() -> str:
            return str(run()["state_type"])

        def history() -> list[str]:
            """Every state the run has had."""
            states = asked("GET", f"{api}/flow_run_states/?flow_run_id={run()['id']}")
            return sorted(f"{each['timestamp']} {each['name']}: {each['message']}" for each in states)

        def retry() -> None:
            asked("POST", f"{api}/flow_runs/{run()['id']}/set_state", RETRY)

        def statuses(name: str) -> list[str]:
            """Of the MLflow runs of that name, the first one first: each attempt has its own."""
            body = {"experiment_ids": ["1"], "max_results": 100}
            runs = asked("POST", f"{mlflow}/runs/search", body)["runs"]
            return [each["info"]["status"] for each in reversed(runs) if each["info"]["run_name"] == name]

        flow, training = "classify end-to-end-seed-0", "train cge"
        process, said = watched(deepzero, "trigger", "classify", "--config", str(config), "--watch")
        eventually(lambda: step(module_home) >= 5 or process.poll() is not None, 240, "the training is under way")
        assert process.poll() is None, said()

        # Servers and workers die in one moment: the run waits for its Dask worker and goes on.
        before = rows(deepzero)
        for name in ("prefect", "mlflow", "dask-worker-1", "prefect-worker"):
            os.kill(before[name]["pid"], signal.SIGKILL)
        eventually(lambda: well(deepzero), 240, "all is well again")
        goes_on()

        # With the scheduler a step is lost: the run says so and ends with a checkpoint.
        os.kill(before["dask-scheduler"]["pid"], signal.SIGKILL)
        assert process.wait(240) == 1, said()
        assert re.search(rf"failed: .* the Dask scheduler at \S+ was lost .* stands at step \d+ of {STEPS}", said()), (
            said()
        )
        assert statuses(training) == statuses(flow) == ["FAILED"]
        retry()
        eventually(lambda: state() == "RUNNING", 120, "it runs again")
        goes_on()

        # The run's own process dies without a word; MLflow hears of it from the worker, after a retry was asked for.
        flow_process(deepzero).kill()
        eventually(lambda: state() == "CRASHED", 120, "Prefect sees it")
        retry()
        eventually(lambda: statuses(training)[1] == statuses(flow)[1] == "KILLED", 60, "MLflow hears of it")
        eventually(lambda: state() == "RUNNING", 120, "it runs again")
        uninterrupted = alone("run", "classify", "--config", str(config), "--set", "cluster.workers=0")
        assert uninterrupted.returncode == 0, uninterrupted.stderr
        eventually(lambda: state() != "RUNNING", 240, "the run is over")
        assert state() == "COMPLETED", "\n".join(history())
        assert sum("Crashed" in line for line in history()) == 1, "\n".join(history())
        assert digest(module_home) == digest(alone.home)
        assert statuses(training) == statuses(flow) == ["FAILED", "KILLED", "FINISHED"]

        down = deepzero("down")
        assert down.returncode == 0, down.stderr
        assert deepzero.processes() == []
    finally:
        deepzero("down")
        for each in deepzero.processes():
            each.kill()
