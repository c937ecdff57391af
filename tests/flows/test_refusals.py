"""Wrong requests and failed work, as the person at the terminal meets them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def assert_refused(completed: Any, *patterns: str, status: int = 2) -> str:
    """One line on stderr, nothing else, and the exit status; the line."""
    assert completed.returncode == status, completed.stderr
    assert completed.stdout == ""
    lines = completed.stderr.splitlines()
    assert len(lines) == 1, completed.stderr
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]
    return str(lines[0])


def test_a_wrong_configuration_is_refused_before_anything_is_created(fresh_home: Any) -> None:
    completed = fresh_home.run("run", "pipeline", "--config", "smoke", "--set", "training.methd=cge")
    assert_refused(completed, r"^error: .*training\.methd.*did you mean 'method'")
    assert not fresh_home.path.exists()


def test_a_dry_run_shows_the_plan_and_creates_nothing(fresh_home: Any) -> None:
    completed = fresh_home.done("run", "pipeline", "--config", "smoke", "--dry-run")
    assert completed.stderr == ""
    for fact in ("digits: 1,437 train, 360 test", "cge, 4 steps of 32 examples", "per step", "GFLOP per step"):
        assert fact in completed.stdout
    assert re.search(r"time +about \d+ ms per step, [\d.]+ m?s in all, on this machine", completed.stdout)
    assert not fresh_home.path.exists()


def test_missing_files_of_a_data_set_are_named_with_their_folder(fresh_home: Any, tmp_path: Path) -> None:
    completed = fresh_home.run(
        "run", "classify", "--config", "cifar10-cnn", "--set", f"data.source={tmp_path}", "--set", "data.name=cifar10"
    )
    assert_refused(completed, r"data_batch_1|cifar-10-batches-py|cifar-10-python", re.escape(str(tmp_path)))
    assert not [path for path in fresh_home.path.rglob("*") if path.is_file()], (
        "nothing that would have to be cleared up"
    )


def test_a_network_that_does_not_fit_is_refused(new_home: Callable[[str], Any]) -> None:
    home = new_home("home")
    before = files(home.path)
    completed = home.run("run", "classify", "--config", "smoke", "--set", "model.name=nowhere.at:all")
    assert_refused(completed, r"nowhere")
    assert files(home.path) == before


@pytest.mark.parametrize("file", ["train.arrow", "test.arrow", "manifest.json"])
def test_a_damaged_store_is_refused_by_the_name_of_the_file(new_home: Callable[[str], Any], file: str) -> None:
    home = new_home("home")
    (damaged,) = (home.path / "data").glob(f"*/{file}")
    damaged.write_bytes(damaged.read_bytes()[:-7])
    completed = home.run("run", "classify", "--config", "smoke")
    assert_refused(completed, re.escape(str(damaged.name)), r"deepzero data prepare digits --force")
    assert not (home.path / "stages").exists()


def test_a_budget_below_one_step_is_refused(new_home: Callable[[str], Any]) -> None:
    home = new_home("home")
    completed = home.run("run", "classify", "--config", "smoke", "--set", "training.query_budget=1")
    assert_refused(completed, r"training\.query_budget=1")
    assert not (home.path / "stages").exists()


def test_a_learning_rate_that_explodes_fails_with_the_step_and_a_hint(new_home: Callable[[str], Any]) -> None:
    home = new_home("home")
    completed = home.run(
        *("run", "classify", "--config", "smoke", "--set", "training.optimizer.lr=1e30", "--set", "baselines=[]"),
        *("--set", "training.schedule.name=constant", "--set", "training.checkpoint_every=1"),
    )
    assert completed.returncode == 1
    lines = completed.stderr.splitlines()
    assert len(lines) == 1, completed.stderr
    assert re.search(r"^error: step \d: .*(not finite|nan|inf).*try a smaller training\.optimizer\.lr", lines[0])
    checkpoint = Path(lines[0].rpartition("the last good checkpoint is ")[2])
    assert checkpoint.is_file() and checkpoint.is_relative_to(home.path)
    assert "Traceback" not in completed.stdout
    statuses = {run.info.run_name: run.info.status for run in home.runs()}
    assert statuses["train cge"] == statuses["classify smoke-seed-0"] == "FAILED"
    reasons = [run.data.tags.get("deepzero.reason", "") for run in home.runs() if run.info.run_name == "train cge"]
    assert reasons[0].startswith("step ")


def test_nobody_at_the_address_of_the_cluster_is_a_wrong_request(new_home: Callable[[str], Any]) -> None:
    home = new_home("home")
    completed = home.run(
        *("run", "classify", "--config", "smoke", "--set", "cluster.address=tcp://127.0.0.1:9"),
        *("--set", "cluster.workers=1", "--set", "cluster.timeout_s=1"),
    )
    assert completed.returncode == 2
    assert re.search(r"^error: no Dask scheduler answers at cluster\.address='tcp://127\.0\.0\.1:9'", completed.stderr)
    assert len(completed.stderr.splitlines()) == 1
