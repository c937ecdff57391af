"""Runs of the command line, and the servers that they talk to, as processes that may be killed, stopped and woken."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300.0

_KEPT_OUT = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE", "DEEPZERO_DEBUG")


def environment(**variables: str) -> dict[str, str]:
    """This process's, without what would lead a run to somebody's stores."""
    kept = {name: value for name, value in os.environ.items() if name not in _KEPT_OUT}
    quiet = {"NO_COLOR": "1", "COLUMNS": "120", "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    return kept | quiet | {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONUNBUFFERED": "1"} | variables


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Process:
    """A process that leads a group of its own; what it prints goes to a file."""

    arguments: list[str]
    output: Path
    variables: dict[str, str] = field(default_factory=dict)

    def start(self) -> "Process":
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as out, self.errors_file.open("ab") as err:
            self._process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=ROOT,
                start_new_session=True,
                env=environment(**self.variables),
            )
        return self

    @property
    def errors_file(self) -> Path:
        return self.output.with_suffix(".err")

    @property
    def errors(self) -> str:
        return self.errors_file.read_text(encoding="utf-8", errors="replace")

    @property
    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """The exit status; a process that does not end is an error of whoever waits."""
        return self._process.wait(timeout)

    def family(self) -> list[psutil.Process]:
        """The process and everything that it has started."""
        try:
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def send(self, how: signal.Signals, *, alone: bool = False) -> None:
        """A signal to the process, or to it and everything that it has started."""
        for process in self.family()[: 1 if alone else None]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(how)

    def kill(self) -> None:
        """SIGKILL for all of it, at once; nothing is left when this returns."""
        family = self.family()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if hasattr(self, "_process"):
            self._process.wait(30)
        psutil.wait_procs(family, timeout=30)


@dataclass
class Server(Process):
    """A process that others talk to."""

    ready: Callable[[], bool] = lambda: True

    def start(self) -> "Server":
        super().start()
        deadline = time.monotonic() + PATIENCE_S
        while not self.ready():
            if not self.running:
                raise AssertionError(f"{' '.join(self.arguments[2:4])} did not start: {self.errors[-500:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{' '.join(self.arguments[2:4])} is not ready after {PATIENCE_S:g} s")
            time.sleep(0.05)
        return self


def mlflow_server(folder: Path) -> tuple[Server, str]:
    """A server with a SQLite file of its own, and its address; it can be started again at the same one."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination"]
    artifacts = (folder / "mlartifacts").as_uri()
    server = Server([*command, *places, artifacts], folder / "mlflow.out", ready=_answers(f"{address}/health"))
    return server, address


def prefect_server(folder: Path) -> tuple[Server, str]:
    """A Prefect server and the address of its interface."""
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    variables = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_LOGGING_LEVEL": "ERROR"}
    address = f"http://127.0.0.1:{port}/api"
    ready = _answers(f"{address}/health")
    return Server([*command, "--no-ui"], folder / "prefect.out", variables, ready=ready), address


def dask_scheduler(folder: Path) -> tuple[Server, str]:
    """A Dask scheduler and its address."""
    port = free_port()
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
    return Server(
        [*command, "--no-dashboard"], folder / "scheduler.out", ready=_listens(port)
    ), f"tcp://127.0.0.1:{port}"


def dask_worker(folder: Path, address: str, number: int) -> Process:
    """A worker process of one thread; it looks for its scheduler for as long as it takes."""
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    return Process([*command, "--host", "127.0.0.1", "--local-directory", str(folder)], folder / f"worker{number}.out")


def _answers(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            return httpx.get(url, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    return ready


def _listens(port: int) -> Callable[[], bool]:
    def ready() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
        return False

    return ready


@dataclass
class Home:
    """A state folder, and the runs in it."""

    path: Path
    variables: dict[str, str] = field(default_factory=dict)
    store: str = ""
    started: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = self.store or f"sqlite:///{self.path / 'mlflow.db'}"

    def start(self, *arguments: str) -> Process:
        """A run of the command line."""
        return self.start_as(sys.executable, "-m", "flows.cli", *arguments)

    def start_as(self, *command: str) -> Process:
        """Any command, with this home."""
        variables = {
            "DEEPZERO_HOME": str(self.path),
            "PREFECT_HOME": str(self.path.with_name(f"{self.path.name}-prefect")),
            **({} if self.store.startswith("sqlite") else {"MLFLOW_TRACKING_URI": self.store}),
            **self.variables,
        }
        output = self.path.with_name(f"{self.path.name}-{len(self.started)}.out")
        process = Process(list(command), output, variables).start()
        self.started.append(process)
        return process

    def done(self, *arguments: str) -> Process:
        """A run that has to succeed."""
        process = self.start(*arguments)
        status = process.wait()
        assert status == 0, f"exit status {status}: {process.errors[-2000:]}"
        return process

    def stages(self, name: str = "train") -> list[Path]:
        return sorted((self.path / "stages" / name).glob("*"))

    def record(self, name: str = "train") -> dict[str, Any]:
        (folder,) = self.stages(name)
        record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))["record"]
        return record

    def history(self, name: str = "train") -> list[dict[str, Any]]:
        (folder,) = self.stages(name)
        return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]

    def checkpoints(self, name: str = "train") -> list[Path]:
        """Newest first."""
        return sorted(self.path.glob(f"stages/{name}/*/checkpoints/*.ckpt"), reverse=True)

    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.store)

    def runs(self) -> list[Run]:
        """MLflow runs, oldest first."""
        client = self.client()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(experiments, order_by=["attributes.start_time"], max_results=1000))

    def wait_for_step(self, process: Process, step: int) -> None:
        """Until the training has written a checkpoint of that step or a later one."""
        deadline = time.monotonic() + PATIENCE_S
        while not any(int(path.stem.partition("-")[2]) >= step for path in self.checkpoints()):
            if not process.running:
                raise AssertionError(f"the run ended before step {step}: {process.errors[-2000:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"the training does not come to step {step}")
            time.sleep(0.02)

    def close(self) -> None:
        for process in self.started:
            process.kill()


def workers_of(process: Process) -> list[psutil.Process]:
    """The Dask workers of a run: spawned by their nannies, none of them the run itself."""
    return [
        child
        for child in process.family()[1:]
        if "spawn_main" in (line := _command(child)) and "multiprocessing.spawn" in line
    ]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def copied(template: Path, place: Path, **settings: Any) -> Home:
    """A home like the template, which has the data and an empty store."""
    shutil.copytree(template, place)
    return Home(place, **settings)


def new_template(place: Path) -> Path:
    """A home with the digits and an empty MLflow store, whose migrations take seconds."""
    code = (
        "from deepzero_core.data import prepare\nfrom infra.home import home\nfrom tasks.tracking import initialise\n"
        "initialise('template')\nprepare('digits', home=home())\n"
    )
    process = Process([sys.executable, "-c", code], place.with_suffix(".out"), {"DEEPZERO_HOME": str(place)}).start()
    if process.wait() != 0:
        raise AssertionError(process.errors[-2000:])
    return place
