"""Runs in a real SQLite store: batches, endings, many processes, killed ones, and a model that comes back."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import mlflow.pytorch
import psutil
import pytest
import torch
from mlflow import MlflowClient
from prefect.exceptions import TerminationSignal
from torch import nn

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.models import build_model
from infra.home import mlflow_artifacts, mlflow_database
from tasks import tracking
from tasks.beside import beside
from tasks.environment import environment, git_state
from tasks.tracking import Run, initialise, metrics_of, run_url, tracking_uri, ui_command
from tasks.tracking_store import PID, REASON, STARTED

ROOT = Path(tracking.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose store is made once: the migrations of a fresh one take seconds."""
    home = tmp_path_factory.mktemp("tracking") / "home with a space"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPZERO_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        initialise("tests")
    return home


@pytest.fixture
def experiment(store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DEEPZERO_HOME", str(store))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return initialise("tests")


def client() -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri())


def history(run: Run, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client().get_metric_history(run.run_id, key)]


def python(code: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_store_lies_below_home(experiment: str, store: Path) -> None:
    assert initialise("tests") == experiment
    assert initialise("others") != experiment
    assert mlflow_database(store).is_file()
    found = client().get_experiment(experiment)
    assert found.artifact_location == mlflow_artifacts(store).as_uri()


def test_a_deleted_experiment_comes_back(experiment: str) -> None:
    deleted = initialise("deleted")
    client().delete_experiment(deleted)
    assert initialise("deleted") == deleted
    assert client().get_experiment(deleted).lifecycle_stage == "active"


def test_processes_that_meet_a_fresh_store_agree(tmp_path: Path) -> None:
    code = "from tasks.tracking import initialise; print(initialise('fresh'))"
    variables = {"DEEPZERO_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": ""}
    started = [python(code, **variables) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    assert len({output for output, _ in answers}) == 1
    assert [errors for _, errors in answers] == ["", ""]


def test_a_run_with_everything(experiment: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"12345")
    settings = {"data": {"name": "digits", "limit": None}, "radii": [0.0, 0.5], "long": "x" * 7000, "empty": {}}
    with Run.start(experiment, "flow", description="what it is", tags={"a": 1}, params=settings) as parent:
        with Run.start(experiment, "stage", parent=parent) as child:
            child.artifact(file, "weights")
            child.artifact(tmp_path, "all")
            child.text("seed: 1\n", "config/experiment.yaml")
            child.tags({"later": True})
        by_id = Run.start(experiment, "another", parent=parent.run_id)
        by_id.end()
        by_id.end("FAILED")  # it has ended already

    whole, part = client().get_run(parent.run_id), client().get_run(child.run_id)
    assert (whole.info.status, whole.info.run_name) == ("FINISHED", "flow")
    assert whole.data.tags["mlflow.note.content"] == "what it is"
    assert whole.data.tags["a"] == "1"
    assert whole.data.params["data.name"] == "digits"
    assert whole.data.params["data.limit"] == "null"
    assert whole.data.params["radii"] == "[0.0, 0.5]"
    assert len(whole.data.params["long"]) == 6000
    saved = client().download_artifacts(parent.run_id, "config/params.json", str(tmp_path))
    assert json.loads(Path(saved).read_text()) == settings
    assert part.data.tags["mlflow.parentRunId"] == whole.info.run_id
    assert part.data.tags["later"] == "True"
    assert {item.path for item in client().list_artifacts(child.run_id)} == {"all", "config", "weights"}
    again = client().get_run(by_id.run_id)
    assert (again.info.status, again.data.tags["mlflow.parentRunId"]) == ("FINISHED", whole.info.run_id)


def test_more_settings_than_one_request_takes(experiment: str) -> None:
    settings = {f"key{number}": number for number in range(230)}
    with Run.start(experiment, "many", params=settings) as run:
        pass
    assert client().get_run(run.run_id).data.params == {key: str(value) for key, value in settings.items()}
    assert client().list_artifacts(run.run_id) == []


def test_metrics_arrive_complete_and_in_batches(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_FLUSH_POINTS", 10_000)
    run = Run.start(experiment, "metrics")
    for step in range(1, 1202):
        run.metrics({"train/loss": 1 / step, "cost/queries": step}, step)
    assert history(run, "train/loss") == []
    run.flush()
    assert history(run, "train/loss") == [(step, 1 / step) for step in range(1, 1202)]
    assert len(history(run, "cost/queries")) == 1201

    run.metrics({"train/loss": math.nan, "test/loss": math.inf}, 1300)
    run.end()
    assert math.isnan(history(run, "train/loss")[-1][1])
    assert history(run, "test/loss")[0][1] > 1e300


def test_metrics_are_sent_on_the_way(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.start(experiment, "many")
    for step in range(500):
        run.metrics({"a": step}, step)
    beside(bool).result()
    assert len(history(run, "a")) == 500
    monkeypatch.setattr(tracking, "_FLUSH_SECONDS", 0.0)
    run.metrics({"b": 1}, 0)
    beside(bool).result()
    assert history(run, "b") == [(0, 1)]
    run.end()


def test_metrics_wait_while_the_store_is_away(
    experiment: str, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_FLUSH_SECONDS", 0.0)
    run = Run.start(experiment, "interrupted")
    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "log_batch", unreachable)
        run.metrics({"a": 1}, 1)
        run.flush()
        run.tags({"b": "late"})
    assert caplog.text.count("MLflow does not answer (ConnectionError: away)") == 1
    assert history(run, "a") == []
    run.metrics({"a": 2}, 2)
    beside(bool).result()
    assert history(run, "a") == [], "a store that has failed is left alone for some seconds"
    run._outbox.gate._again = 0.0
    run.metrics({"a": 3}, 3)
    beside(bool).result()
    assert history(run, "a") == [(1, 1), (2, 2), (3, 3)]
    assert client().get_run(run.run_id).data.tags["b"] == "late"
    assert "MLflow answers again" in caplog.text
    run.end()
    assert not list((store / "spool").glob(f"{run.run_id}*"))


def unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("away")


def test_what_the_store_refuses_is_put_aside_and_does_not_hold_up_the_rest(
    experiment: str, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.start(experiment, "refused")
    run.metrics({"a": 1}, 1)
    run.metrics({"a": 1.5, "no:such/../name": 1}, 2)
    run.metrics({"a": 2}, 3)
    run.end()
    assert history(run, "a") == [(1, 1), (2, 1.5), (3, 2)]
    (aside,) = (store / "spool").glob(f"{run.run_id}.refused")
    assert "MLflow did not take 1 metrics" in caplog.text and str(aside) in caplog.text
    assert [point[0] for point in json.loads(aside.read_text())["points"]] == ["no:such/../name"]
    with pytest.raises(WorkError, match="MLflow did not take tags"), Run.start(experiment, "told at once") as other:
        other.tags({"no:such/../name": 1})


@pytest.mark.parametrize(
    ("raised", "status", "reason"),
    [
        (ValueError("two\nlines"), "FAILED", "ValueError: two lines"),
        (WorkError("the loss is not finite at step 3"), "FAILED", "the loss is not finite at step 3"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
        (SystemExit(3), "KILLED", "SystemExit: 3"),
        (TerminationSignal(signal=15), "KILLED", "TerminationSignal"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_run_says_how_it_ended(experiment: str, raised: BaseException, status: str, reason: str) -> None:
    with pytest.raises(type(raised)), Run.start(experiment, "ends") as run:
        run.metrics({"a": 1}, 1)
        raise raised
    found = client().get_run(run.run_id)
    assert (found.info.status, found.data.metrics) == (status, {"a": 1})
    assert found.data.tags[REASON] == reason


def test_the_first_error_is_the_one_told(experiment: str) -> None:
    with pytest.raises(ValueError, match="first"), Run.start(experiment, "two errors") as run:
        client().delete_run(run.run_id)
        raise ValueError("first")


def test_a_killed_process_leaves_no_run_running(experiment: str) -> None:
    code = (
        "import os, signal\nfrom tasks.tracking import Run, initialise\n"
        "run = Run.start(initialise('tests'), 'killed')\nrun.metrics({'a': 1}, 1)\nrun.flush()\n"
        "print(run.run_id, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = python(code)
    output, errors = process.communicate(timeout=120)
    killed = output.strip()
    assert (process.returncode, errors) == (-9, "")
    assert client().get_run(killed).info.status == "RUNNING"

    mine = Run.start(experiment, "alive")
    reused = Run.start(experiment, "its number is another process's now")
    # This process's number, but begun long ago: what a number given away twice looks like.
    client().set_tag(reused.run_id, STARTED, f"{psutil.Process().create_time() - 3600:.2f}")
    elsewhere = Run.start(experiment, "on another machine")
    elsewhere.tags({PID: 1 << 30, "deepzero.host": "another"})
    initialise("another experiment")

    found = client().get_run(killed)
    assert found.info.status == "KILLED"
    assert found.data.tags[REASON] == f"process {process.pid} was gone without having ended this run"
    assert client().get_run(reused.run_id).info.status == "KILLED"
    assert client().get_run(mine.run_id).info.status == "RUNNING"
    assert client().get_run(elsewhere.run_id).info.status == "RUNNING"
    for run in (mine, elsewhere):
        run.end()


def test_a_resumed_run_goes_on_without_repeating_itself(experiment: str) -> None:
    first = Run.start(experiment, "resumed")
    for step in range(1, 8):
        first.metrics({"train/loss": step}, step)
    first.end("KILLED", reason="gone")
    with Run.resume(first.run_id) as second:
        found = client().get_run(first.run_id)
        assert found.info.status == "RUNNING"
        assert REASON not in found.data.tags
        for step in range(5, 10):
            second.metrics({"train/loss": step, "new": step}, step)
    assert history(second, "train/loss") == [(step, step) for step in range(1, 10)]
    assert [step for step, _ in history(second, "new")] == [5, 6, 7, 8, 9]
    assert client().get_run(first.run_id).info.status == "FINISHED"


def test_an_unknown_run_cannot_be_resumed(experiment: str) -> None:
    with pytest.raises(RequestError, match=f"MLflow run {'0' * 32} cannot be resumed"):
        Run.resume("0" * 32)


def test_a_lost_artifact_is_named(experiment: str, tmp_path: Path) -> None:
    with Run.start(experiment, "artifact") as run, pytest.raises(WorkError, match=r"did not take artifact .*gone\.bin"):
        run.artifact(tmp_path / "gone.bin")


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: build_model("cnn", in_channels=1, num_classes=10, image_size=(8, 8), seed=1), (1, 8, 8)),
        (lambda: build_model("resnet20", in_channels=3, num_classes=5, image_size=(16, 16), seed=1), (3, 16, 16)),
    ],
    ids=["cnn", "resnet20"],
)
def test_a_model_comes_back_for_any_batch(
    experiment: str, monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    module = build().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Statistics that eval mode uses and that differ from those of any batch.
        for _ in range(3):
            module(torch.rand(16, *shape, generator=generator) * 3 + 1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with Run.start(experiment, "model") as run:
        uri = run.model(module, torch.rand(1, *shape, generator=generator), "network")
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", tracking_uri())
    loaded = mlflow.pytorch.load_model(uri)
    module.eval()
    for size in (1, 7, 64):
        images = torch.rand(size, *shape, generator=generator) * 3
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), module(images), rtol=0, atol=1e-6)
    (logged,) = client().search_logged_models([experiment], filter_string=f"source_run_id = '{run.run_id}'")
    assert (logged.status, logged.name, logged.model_uri) == ("READY", "network", uri)
    requirements = Path(logged.artifact_location.removeprefix("file://").replace("%20", " ")) / "requirements.txt"
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements.read_text().splitlines()
    assert [output.model_id for output in client().get_run(run.run_id).outputs.model_outputs] == [logged.model_id]


class BatchOfTwo(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.reshape(2, 4)


class Branching(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if inputs.sum() > 0 else -inputs


@pytest.mark.parametrize("module", [BatchOfTwo(), Branching()], ids=["one-size", "branches-on-values"])
def test_a_model_that_would_not_come_back_is_refused(experiment: str, module: nn.Module) -> None:
    with Run.start(experiment, "refused") as run, pytest.raises(WorkError, match=r"torch\.export cannot take this"):
        run.model(module, torch.ones(1, 4), "network")
    (logged,) = client().search_logged_models([experiment], filter_string=f"source_run_id = '{run.run_id}'")
    assert logged.status == "FAILED"


def test_a_store_of_the_users_is_respected(experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path / 'mine.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with Run.start(initialise("mine"), "run") as run:
        run.metrics({"a": 1}, 1)
    assert (tmp_path / "mine.db").is_file()
    assert MlflowClient(tracking_uri=uri).get_run(run.run_id).data.metrics == {"a": 1}


@pytest.mark.parametrize("uri", ["file:///nowhere", "http://user:secret@127.0.0.1:9", "nonsense://x"])
def test_a_store_that_does_not_open_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(RequestError, match=r"MLFLOW_TRACKING_URI=.* does not open: ") as caught:
        initialise("none")
    assert "secret" not in str(caught.value)


def test_a_damaged_store_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow_database(home).parent.mkdir(parents=True)
    mlflow_database(home).write_bytes(b"no database " * 1000)
    with pytest.raises(WorkError, match=r"mlflow\.db does not open: .*not a database"):
        initialise("damaged")


def test_history_lines_become_metrics() -> None:
    step = {"kind": "step", "step": 1, "epoch": 0, "loss": 2.5, "forward_flops": 3e9, "peak_memory_bytes": 1 << 21}
    assert metrics_of(step) == {"train/loss": 2.5, "cost/forward_gflop": 3.0, "cost/peak_memory_mib": 2.0}
    evaluation = {"kind": "evaluation", "step": 1, "queries": 7, "test_accuracy": 0.5, "test_loss": 1.5}
    assert metrics_of(evaluation) == {"test/accuracy": 0.5, "test/loss": 1.5}


def test_where_to_look(experiment: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ui_command()
    assert command is not None
    words = shlex.split(command)
    assert words[:4] == [sys.executable, "-m", "mlflow", "server"]
    assert words[words.index("--backend-store-uri") + 1] == f"sqlite:///{mlflow_database(store)}"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert run_url("1", "abc").startswith("http://127.0.0.1:5000/#/experiments/1/runs/abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://runs.example.org/")
    assert ui_command() is None
    assert run_url("1", "abc").startswith("https://runs.example.org/#/experiments/1/runs/abc")


def test_the_environment_names_no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    facts = environment()
    assert facts["torch"] == torch.__version__
    assert facts["mlflow"] == mlflow.__version__
    assert all(isinstance(value, str) and value for value in facts.values())
    assert len(facts["deepzero.host"]) == 12
    assert platform.node() not in facts.values()


def test_the_commit_is_that_of_the_checkout_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) == ("unknown", "unknown")
    git("init", "--quiet")
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == (commit, "false")
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == (commit, "true")
    assert git_state(tmp_path / "inside") == ("unknown", "unknown")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert git_state(tmp_path) == (commit, "true")
