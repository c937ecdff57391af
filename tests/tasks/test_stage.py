"""Stages: done once, skipped while nothing changed, gone on with after a kill, shared by runs that start at once."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

import tasks
from configs.schema import Experiment
from deepzero_core.errors import WorkError
from tasks import stage as stages
from tasks.records import Record
from tasks.stage import Stage, Tracking, code_digest, key, perform, save_tensors, write_atomically
from tasks.tracking import Run, initialise, tracking_uri

ROOT = Path(tasks.__file__).resolve().parent.parent


class Made(Record):
    """What the stages of these tests make."""

    file: Path
    value: int


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """A store that is made once: its migrations take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPZERO_HOME", str(tmp_path_factory.mktemp("stages") / "home"))
        experiment = initialise("stages")
        with Run.start(experiment, "parent") as run:
            return Tracking(experiment_id=experiment, run_id=run.run_id)


calls: list[Path] = []


def work(stage: Stage) -> Made:
    calls.append(stage.folder)
    (stage.folder / "made").write_text("content")
    stage.summarise(score=0.5)
    return Made(file=stage.folder / "made", value=len(calls))


def record_of(outcome: object) -> tuple[Made, str]:
    """The record of what `perform` returned, and the name of its state."""
    if isinstance(outcome, Made):
        return outcome, "Done"
    return outcome.result(), outcome.name  # type: ignore[attr-defined] # a Prefect state


def test_a_stage_is_done_once(home: Path, tracking: Tracking, capsys: pytest.CaptureFixture[str]) -> None:
    calls.clear()
    first, how = record_of(perform(tracking, "make", Made, {"a": 1}, work))
    again, cached = record_of(perform(tracking, "make", Made, {"a": 1}, work))
    assert (how, cached, len(calls)) == ("Done", "Cached", 1)
    assert first == again
    assert first.file.parent == home / "stages" / "make" / key("make", {"a": 1})
    other, _ = record_of(perform(tracking, "make", Made, {"a": 2}, work))
    assert len(calls) == 2 and other.file != first.file
    lines = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["done", "unchanged,", "done"]


def test_a_skipped_stage_shows_its_numbers_and_where_they_come_from(home: Path, tracking: Tracking) -> None:
    for _ in range(2):
        perform(tracking, "shown", Made, {}, work, label="once")
    client = MlflowClient(tracking_uri=tracking_uri())
    made, skipped = sorted(
        (
            run
            for run in client.search_runs([tracking.experiment_id], max_results=100)
            if run.info.run_name == "shown once"
        ),
        key=lambda run: "deepzero.cached_from" in run.data.tags,
    )
    assert skipped.data.tags["deepzero.cached_from"] == made.info.run_id
    assert skipped.data.metrics == made.data.metrics == {"score": 0.5}
    assert {run.data.tags["mlflow.parentRunId"] for run in (made, skipped)} == {tracking.run_id}
    assert {run.info.status for run in (made, skipped)} == {"FINISHED"}


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "garbage", "binary", "half", "other", "digit", "changed", "file"]
)
def test_what_is_incomplete_or_damaged_is_done_again(
    home: Path, tracking: Tracking, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls.clear()
    first, _ = record_of(perform(tracking, "make", Made, {"a": 1}, work))
    record = first.file.parent / "record.json"
    text = record.read_text()
    match damage:
        case "missing":
            record.unlink()
        case "empty":
            record.write_text("")
        case "garbage":
            record.write_text("[]")
        case "binary":
            record.write_bytes(b"\xff\xfe\x00")
        case "half":
            record.write_text(text[: len(text) // 2])
        case "other":
            record.write_text(text.replace('"value"', '"worth"'))
        case "digit":
            record.write_text(text.replace('"value": 1', '"value": 2'))
        case "changed":
            first.file.write_text("contend")
        case "file":
            first.file.unlink()
    _, how = record_of(perform(tracking, "make", Made, {"a": 1}, work))
    assert how == "Done" and len(calls) == 2
    assert ("is damaged or gone: the stage make is done again" in caplog.text) == (damage != "missing")
    assert record_of(perform(tracking, "make", Made, {"a": 1}, work))[1] == "Cached"


def test_a_stage_that_failed_leaves_no_record_and_a_run_that_says_why(home: Path, tracking: Tracking) -> None:
    def fail(stage: Stage) -> Made:
        (stage.folder / "half").write_text("kept for the next attempt")
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        perform(tracking, "fails", Made, {}, fail)
    folder = home / "stages" / "fails" / key("fails", {})
    assert (folder / "half").exists() and not (folder / "record.json").exists()
    runs = MlflowClient(tracking_uri=tracking_uri()).search_runs([tracking.experiment_id], max_results=100)
    assert {run.info.status for run in runs if run.info.run_name == "fails"} == {"FAILED"}
    assert record_of(perform(tracking, "fails", Made, {}, work))[1] == "Done"


def test_two_equal_stages_at_once_do_the_work_once(home: Path, tracking: Tracking) -> None:
    calls.clear()
    outcomes: list[tuple[Made, str]] = []

    def slow(stage: Stage) -> Made:
        time.sleep(1)
        return work(stage)

    threads = [
        threading.Thread(target=lambda: outcomes.append(record_of(perform(tracking, "both", Made, {}, slow))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(how for _, how in outcomes) == ["Cached", "Done"]
    assert outcomes[0][0] == outcomes[1][0]


def test_a_killed_process_leaves_no_lock_behind(home: Path) -> None:
    lock = home / "lock"
    home.mkdir()
    code = f"import filelock, os\nfilelock.FileLock({str(lock)!r}).acquire()\nos.kill(os.getpid(), 9)\n"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    import filelock

    with filelock.FileLock(lock, timeout=1):
        assert lock.exists()


def test_a_key_depends_on_name_inputs_and_code_and_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment()
    base = key("train", {"experiment": experiment, "made": Made(file=Path("/a"), value=1)})
    assert len(base) == 24 and set(base) <= set("0123456789abcdef")
    assert base == key("train", {"made": Made(file=Path("/b"), value=1), "experiment": Experiment()})
    assert base != key("prune", {"experiment": experiment, "made": Made(file=Path("/a"), value=1)})
    assert base != key("train", {"experiment": experiment, "made": Made(file=Path("/a"), value=2)})
    assert base != key("train", {"experiment": Experiment(seed=1), "made": Made(file=Path("/a"), value=1)})
    monkeypatch.setattr(stages, "code_digest", lambda: "other")
    assert base != key("train", {"experiment": experiment, "made": Made(file=Path("/a"), value=1)})


@pytest.mark.parametrize(
    "changed",
    [
        {"a": 1.0},
        {"a": "1"},
        {"a": [1]},
        {"a": None},
        {"a": True},
        {"b": 1},
        {"a": {"a": 1}},
        {},
    ],
    ids=str,
)
def test_inputs_that_differ_in_type_or_name_have_other_keys(changed: dict[str, object]) -> None:
    assert key("make", {"a": 1}) != key("make", changed)


def test_the_code_digest_is_the_same_in_every_process_and_changes_with_the_code(tmp_path: Path) -> None:
    code = "from tasks.stage import code_digest; print(code_digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == code_digest()


@pytest.mark.parametrize(
    "write",
    [lambda path: write_atomically(path, "new"), lambda path: save_tensors(path, {"weight": torch.ones(3)})],
    ids=["text", "tensors"],
)
def test_files_appear_whole_or_not_at_all(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "record.json"
    write_atomically(target, "old")

    def fail(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WorkError, match=r"record\.json cannot be written: No space left on device"):
        write(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert mlflow.active_run() is None
