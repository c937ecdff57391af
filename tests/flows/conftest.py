"""Runs of the command line in processes and homes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240


@dataclass
class Home:
    """A state folder, and the runs in it."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """A run that may be killed: it leads a process group that everything it starts belongs to."""
        variables = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={
                **variables,
                "NO_COLOR": "1",
                "COLUMNS": "120",
                "DEEPZERO_HOME": str(self.path),
                "PREFECT_HOME": str(self.path.with_name(self.path.name + "-prefect")),
                **self.environment,
            },
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return finish(self.start(*arguments))

    def done(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """A run that has to succeed."""
        completed = self.run(*arguments)
        assert completed.returncode == 0, completed.stderr
        return completed

    def stage(self, name: str = "train") -> Path:
        """The folder of the only stage of that name."""
        (folder,) = (self.path / "stages" / name).iterdir()
        return folder

    def record(self, name: str = "train") -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.stage(name) / "record.json").read_text())["record"]
        return record

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.stage() / "history.jsonl").read_text().splitlines()]

    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=f"sqlite:///{self.path / 'mlflow.db'}")

    def runs(self) -> list[Run]:
        """MLflow runs, oldest first."""
        client = self.client()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(experiments, order_by=["attributes.start_time"], max_results=1000))

    def wait_for_step(self, process: "subprocess.Popen[str]", step: int, stage: str = "train") -> None:
        """Until the training has written a checkpoint of that step or a later one."""
        deadline = time.monotonic() + PATIENCE_S
        while not any(
            int(path.stem.partition("-")[2]) >= step for path in self.path.glob(f"stages/{stage}/*/checkpoints/*.ckpt")
        ):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the training does not come to that step"
            time.sleep(0.02)


def finish(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill_group(process: "subprocess.Popen[str]", how: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The Dask workers of a run: spawned by a nanny's helper, none of them the run itself."""
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "multiprocessing.spawn" in " ".join(child.cmdline()) and "spawn_main" in " ".join(child.cmdline())
    ]


@pytest.fixture
def kill() -> Callable[..., None]:
    return kill_group


@pytest.fixture
def workers() -> Callable[..., list[psutil.Process]]:
    return workers_of


@pytest.fixture
def end() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    return finish


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with data and an empty MLflow store, whose migrations take seconds."""
    from deepzero_core.data import prepare
    from tasks.tracking import initialise

    home = tmp_path_factory.mktemp("template") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPZERO_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        initialise("template")
    prepare("digits", home=home)
    return home


@pytest.fixture
def new_home(template: Path, tmp_path: Path, prefect_server: None) -> Iterator[Callable[[str], Home]]:
    """Homes copied from the template, all reporting to one Prefect server; nothing of theirs outlives the test."""
    from prefect.settings import PREFECT_API_URL

    server = PREFECT_API_URL.value()
    assert server
    homes: list[Home] = []

    def make(name: str) -> Home:
        shutil.copytree(template, tmp_path / name)
        homes.append(Home(tmp_path / name, {"PREFECT_API_URL": server}))
        return homes[-1]

    yield make
    for home in homes:
        for process in home.started:
            kill_group(process)
            process.communicate()


@pytest.fixture(scope="module")
def fresh_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home where nothing has been, as after installation, without any server."""
    home = Home(tmp_path_factory.mktemp("fresh") / "home")
    yield home
    for process in home.started:
        kill_group(process)
        process.communicate()
