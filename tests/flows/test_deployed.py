"""Deployments on a real Prefect server with a real worker: applied, refused, triggered, watched, cancelled, gone on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from stacks import answered

import configs
from configs.loading import SCHEMAS
from flows.catalogue import ENTRYPOINTS
from infra.deployments import FILE, POOL, apply

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
STEPS = 250
CONFIG = f"""
name: cancelled
data: {{name: digits, batch_size: 64, train_limit: 256, test_limit: 64, crop_padding: 1}}
model: {{name: cnn, depth: 2, width: 6}}
pruning: {{method: random, sparsity: 0.3}}
training:
  epochs: 100
  steps: {STEPS}
  schedule: {{warmup_epochs: 1}}
  checkpoint_every: 10
cluster: {{workers: 1}}
"""


@dataclass
class Server:
    """A Prefect server with the deployments, and the processes of the module."""

    api: str
    folder: Path
    names: list[str]
    started: list["subprocess.Popen[bytes]"]

    def get(self, path: str) -> Any:
        return self.ask("GET", path).raise_for_status().json()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.ask("POST", path, body)

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return answered(method, f"{self.api}{path}", body)

    def deployment(self, name: str) -> Any:
        return self.get(f"/deployments/name/{name}/{name}")

    def runs(self) -> list[Any]:
        found: list[Any] = self.post("/flow_runs/filter", sort="EXPECTED_START_TIME_DESC").json()
        return found

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[bytes]":
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
                # The worker runs flows in folders of their own: there they find the package as it is installed.
                env={**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(self.folder), **environment},
            )
        self.started.append(process)
        return process

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    made = Server(f"http://127.0.0.1:{port}/api", tmp_path_factory.mktemp("server"), [], [])
    process = made.start("server", "start", "--port", str(port))
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert process.poll() is None, made.log()
            with suppress(httpx.TransportError):
                if httpx.get(f"{made.api}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.2)
        made.names = apply(made.api)
        yield made
    finally:
        for each in reversed(made.started):
            _end(each)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """In order, so that a worker ends its flow runs; whatever is left of them then goes by force."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for each in children:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.kill()
    process.wait()


def test_every_flow_has_a_deployment(server: Server) -> None:
    assert server.names == sorted(f"{name}/{name}" for name in ENTRYPOINTS)
    assert set(ENTRYPOINTS) == set(SCHEMAS)
    for name, entrypoint in ENTRYPOINTS.items():
        found = server.deployment(name)
        assert found["entrypoint"] == entrypoint
        assert (found["work_pool_name"], found["pull_steps"], found["enforce_parameter_schema"]) == (POOL, [], True)
        assert found["description"] and "deepzero" in found["tags"]
        assert found["global_concurrency_limit"]["limit"] == 1
        (schedule,) = found["schedules"]
        assert (schedule["active"], schedule["schedule"]["timezone"]) == (False, "UTC")
        default = SCHEMAS[name].model_validate(found["parameters"]["experiment"])
        assert default.model_dump(mode="json") == found["parameters"]["experiment"], "the form shows every value"
    assert server.get(f"/work_pools/{POOL}")["type"] == "process"


def test_applied_again_it_leaves_what_the_user_has_switched_on(server: Server) -> None:
    before = server.deployment("study")
    (schedule,) = before["schedules"]
    path = f"/deployments/{before['id']}/schedules/{schedule['id']}"
    server.ask("PATCH", path, {"active": True}).raise_for_status()
    server.ask("PATCH", f"/work_pools/{POOL}", {"concurrency_limit": 7}).raise_for_status()
    try:
        own = {"schedule": {"cron": "30 6 * * 1-5", "timezone": "Europe/Berlin"}, "active": True}
        classify = server.deployment("classify")
        created = server.ask("POST", f"/deployments/{classify['id']}/schedules", [own])
        created.raise_for_status()
        assert apply(server.api) == server.names
        there = {each["schedule"]["cron"]: each["active"] for each in server.deployment("classify")["schedules"]}
        assert there == {"0 1 * * *": False, "30 6 * * 1-5": True}
        after = server.deployment("study")
        assert after["id"] == before["id"]
        assert [(each["id"], each["active"]) for each in after["schedules"]] == [(schedule["id"], True)]
        assert server.get(f"/work_pools/{POOL}")["concurrency_limit"] == 7
    finally:
        for name in ("study", "classify"):
            deployment = server.deployment(name)
            for each in deployment["schedules"]:
                path = f"/deployments/{deployment['id']}/schedules/{each['id']}"
                server.ask("PATCH", path, {"active": False}).raise_for_status()


@pytest.mark.parametrize(
    ("experiment", "reason"),
    [
        ({"data": {"batch_size": 0}}, "'experiment.data.batch_size'. Failure reason: 0 is less than the minimum of 1"),
        ({"training": {"method": "cga"}}, "'cga' is not one of ['cge', 'rge',"),
        ({"trainin": {}}, "Additional properties are not allowed ('trainin' was unexpected)"),
        ({"seed": "one"}, "'one' is not of type 'integer'"),
        ({"pruning": {"sparsity": 1}}, "'experiment.pruning.sparsity'. Failure reason: 1 is greater than or equal"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_at_submission(server: Server, experiment: Any, reason: str) -> None:
    runs = len(server.runs())
    identifier = server.deployment("classify")["id"]
    refused = server.post(f"/deployments/{identifier}/create_flow_run", parameters={"experiment": experiment})
    assert refused.status_code == 409
    assert reason in refused.json()["detail"]
    assert len(server.runs()) == runs


def trigger(*arguments: str, api: str, home: Path) -> "subprocess.Popen[str]":
    variables = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "trigger", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**variables, "NO_COLOR": "1", "COLUMNS": "120", "PREFECT_API_URL": api, "DEEPZERO_HOME": str(home)},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clasify",), "there is no deployment 'clasify'; did you mean 'classify'?"),
        (("classify/nightly",), "there is no deployment 'classify/nightly' on this server; did you mean 'classify/cl"),
        (("classify", "--set", "training.epoch=3"), "--set training.epoch=3: training.epoch is not a known key; did"),
        (("defend", "--config", "dmo"), "there is neither a file nor a preset for defend called 'dmo'; did you mean"),
        (("classify", "--json", "x.json"), "--json needs --watch: there are no results before the run has ended"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_told_before_anything_is_submitted(
    server: Server, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from flows import trigger as triggered
    from flows.cli import main

    monkeypatch.setattr(triggered, "api_url", lambda: server.api)
    runs = len(server.runs())
    with pytest.raises(SystemExit) as ended:
        main(["trigger", *arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.startswith(f"error: {message}") and len(captured.err.splitlines()) == 1
    assert (captured.out, len(server.runs())) == ("", runs)


def test_a_server_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        process = trigger("classify", "--config", "smoke", api=nobody, home=tmp_path)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(rf"error: no Prefect server answers at {nobody} \(ConnectError\); `deepzero up` .*\n", err)


def test_cancelled_in_mid_run_it_goes_on_to_the_same_bits(
    server: Server, new_home: Callable[[str], Any], tmp_path: Path
) -> None:
    alone = new_home("alone")
    file, json_file = tmp_path / "cancelled.yaml", tmp_path / "out.json"
    file.write_text(CONFIG)
    uninterrupted = alone.start("run", "classify", "--config", str(file), "--set", "cluster.workers=0")
    home = new_home("cut")
    worker = server.start(
        "worker",
        "start",
        "--pool",
        POOL,
        PREFECT_API_URL=server.api,
        DEEPZERO_HOME=str(home.path),
        MLFLOW_TRACKING_URI="",
    )
    arguments = ("classify", "--config", str(file), "--watch")

    watched = trigger(*arguments, api=server.api, home=home.path)
    home.wait_for_step(watched, 10)
    engine = [each for each in psutil.Process(worker.pid).children() if "prefect.engine" in " ".join(each.cmdline())]
    processes = [*engine, *(child for each in engine for child in each.children(recursive=True))]
    assert any("spawn_main" in " ".join(each.cmdline()) for each in processes), "Dask workers"
    (run,) = [each for each in server.runs() if each["state_type"] == "RUNNING"]
    assert "mlflow-run" in {each["key"] for each in server.post("/artifacts/latest/filter").json()}
    server.post(f"/flow_runs/{run['id']}/set_state", state={"type": "CANCELLING"}).raise_for_status()
    out, err = watched.communicate(timeout=240)
    assert watched.returncode == 130, out + err
    assert "the run was cancelled; triggered again" in out
    assert not psutil.wait_procs(processes, timeout=30)[1], "nothing of it is left"
    assert server.get(f"/flow_runs/{run['id']}")["state_type"] == "CANCELLED"
    statuses = {each.info.run_name: each.info.status for each in home.runs()}
    assert statuses["train cge"] == statuses["classify cancelled-seed-0"] == "KILLED"
    reason = {each.data.tags.get("deepzero.reason") for each in home.runs() if each.info.run_name == "train cge"}
    assert reason == {"TerminationSignal"}
    stood_at = max(int(path.stem.partition("-")[2]) for path in (home.stage() / "checkpoints").glob("*.ckpt"))
    assert 10 <= stood_at < STEPS
    # That of the step that it was stopped at, unless this was just being written down.
    assert stood_at in (home.history()[-1]["step"], home.history()[-1]["step"] // 10 * 10)

    again = trigger(*arguments, "--json", str(json_file), api=server.api, home=home.path)
    out, err = again.communicate(timeout=400)
    assert again.returncode == 0, out + err + server.log()
    assert err == ""
    assert re.search(r"^prune +unchanged, skipped$", out, re.M) and re.search(r"^train cge +done in ", out, re.M)
    assert re.search(r"^CGE +30% ", out, re.M), "the closing table"
    out, err = uninterrupted.communicate(timeout=400)
    assert uninterrupted.returncode == 0, err
    assert home.record()["weights_digest"] == alone.record()["weights_digest"]
    assert [line["step"] for line in home.history() if line["kind"] == "step"] == list(range(1, STEPS + 1))
    result = json.loads(json_file.read_text())
    (expected,) = (alone.path / "reports").glob("*/result.json")
    same = json.loads(expected.read_text())
    for key in ("test_accuracy", "test_loss", "queries", "steps", "confusion"):
        assert result["methods"][0][key] == same["methods"][0][key], key

    before = len(server.runs())
    artifacts = {each["key"]: each for each in server.post("/artifacts/latest/filter").json()}
    assert {"mlflow-run", "report", "result", "progress-train-cge"} <= set(artifacts)
    assert artifacts["progress-train-cge"]["data"] == 100
    assert artifacts["report"]["data"].startswith("# cancelled")
    assert json.loads(artifacts["result"]["data"])[0]["method"] == "CGE"
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in artifacts)

    # Prefect's own command, with the whole configuration as it is documented: all is there already.
    whole = json.dumps(configs.load(str(file), flow="classify").model_dump(mode="json"))
    plain = server.start(
        *("deployment", "run", "classify/classify", "--param", f"experiment={whole}", "--watch"),
        PREFECT_API_URL=server.api,
    )
    assert plain.wait(240) == 0, server.log()
    assert server.runs()[0]["state_type"] == "COMPLETED" and len(server.runs()) == before + 1
    assert [line["step"] for line in home.history() if line["kind"] == "step"] == list(range(1, STEPS + 1))


def test_prefect_itself_deploys_the_same_file(server: Server) -> None:
    """What `prefect deploy --all` would do from the root of the repository, up to the server."""
    import yaml
    from prefect.cli.deploy._models import PrefectYamlModel

    model = PrefectYamlModel.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))
    assert {deployment.name: deployment.entrypoint for deployment in model.deployments} == ENTRYPOINTS
