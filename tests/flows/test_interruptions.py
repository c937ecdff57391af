"""Runs that are killed, stopped, doubled, or lose their workers: the same bits at the end, and nothing twice."""

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.timeout(600)

CONFIG = """
name: interrupted
data: {name: digits, batch_size: 64, train_limit: 256, test_limit: 64, crop_padding: 1}
model: {name: cnn, depth: 2, width: 6}
pruning: {method: random, sparsity: 0.3}
training:
  epochs: 10
  steps: 40
  schedule: {warmup_epochs: 1}
  checkpoint_every: 2
"""
STEPS = 40


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """Arguments of the run that is interrupted."""
    file = tmp_path / "interrupted.yaml"
    file.write_text(CONFIG)
    return ["run", "classify", "--config", str(file)]


def assert_complete(home: Any) -> None:
    """History and MLflow have every step once, in order."""
    lines = home.history()
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == list(range(4, STEPS + 1, 4))
    (trained,) = [
        r
        for r in home.runs()
        if (r.info.run_name, r.info.status) == ("train cge", "FINISHED") and "deepzero.cached_from" not in r.data.tags
    ]
    keys = [key for key in trained.data.metrics if key.rpartition("/")[2] == "loss" and "test" not in key]
    for key in keys:
        counts = Counter(point.step for point in home.client().get_metric_history(trained.info.run_id, key))
        assert {step: count for step, count in counts.items() if step} == dict.fromkeys(range(1, STEPS + 1), 1)
    assert keys


def test_killed_at_any_step_and_by_a_lost_worker_it_ends_with_the_same_bits(
    new_home: Callable[[str], Any], run: list[str], kill: Any, workers: Any, end: Any
) -> None:
    """One run is left alone, without workers. The other is killed as a whole (-9) at a random step, finds its newest
    checkpoint damaged, goes on with two workers, and loses one of them.
    """
    alone = new_home("alone")
    alone.done(*run, "--set", "cluster.workers=0")
    cut = new_home("cut")
    first = cut.start(*run)
    cut.wait_for_step(first, random.randint(4, 16))
    kill(first)
    first.communicate()
    assert not (cut.stage() / "record.json").exists()
    newest = max((cut.stage() / "checkpoints").glob("*.ckpt"))
    content = bytearray(newest.read_bytes())
    content[-100] ^= 0x10
    newest.write_bytes(content)
    second = cut.start(*run)
    cut.wait_for_step(second, int(newest.stem.partition("-")[2]) + 4)
    victim = workers(second)[0]
    victim.kill()
    completed = end(second)
    assert completed.returncode == 0, completed.stderr
    assert re.search(rf"^warning: checkpoint {newest} is damaged: .*; using an older one$", completed.stderr, re.M)
    assert re.search(r"^WARNING: Dask worker tcp://\S+ was lost: its coordinate ranges", completed.stderr, re.M)
    assert "Traceback" not in completed.stderr
    assert cut.record()["weights_digest"] == alone.record()["weights_digest"]
    assert (cut.stage().name, cut.record()["queries"]) == (alone.stage().name, alone.record()["queries"])
    assert_complete(alone)
    assert_complete(cut)
    statuses = Counter(r.info.status for r in cut.runs() if r.info.run_name == "train cge")
    assert statuses == {"KILLED": 1, "FINISHED": 1}, "what the kill left RUNNING is ended by the next run"


@pytest.mark.parametrize(
    "whom", ["the whole group, as a supervisor does", pytest.param("the run alone", marks=pytest.mark.slow)]
)
def test_asked_to_stop_it_ends_its_runs_and_goes_on_later(
    whom: str, new_home: Callable[[str], Any], run: list[str], kill: Any, end: Any
) -> None:
    home = new_home("stopped")
    home.environment.pop("PREFECT_API_URL")  # the server of its own has to end, too
    process = home.start(*run)
    home.wait_for_step(process, 4)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("infra.temporary_server" in " ".join(child.cmdline()) for child in children)
    if whom == "the run alone":
        process.send_signal(signal.SIGTERM)
    else:
        kill(process, signal.SIGTERM)
    started = time.monotonic()
    completed = end(process)
    assert time.monotonic() - started < 60
    assert completed.returncode == 143
    assert completed.stderr == "stopped; the same command goes on from the last checkpoint\n"
    assert not list(home.path.glob("logs/*")), "a stop is no failure"
    assert {r.info.status for r in home.runs() if r.info.run_name in ("train cge", "classify interrupted-seed-0")} == {
        "KILLED"
    }
    assert not psutil.wait_procs(children, timeout=15)[1], "it leaves no process behind"
    again = home.done(*run)
    assert "prune" in again.stdout and "unchanged, skipped" in again.stdout
    assert_complete(home)


@pytest.mark.slow
def test_two_identical_runs_at_once_do_the_work_once(new_home: Callable[[str], Any], run: list[str], end: Any) -> None:
    home = new_home("both")
    home.environment.pop("PREFECT_API_URL")  # two servers on one database, as two terminals have them
    both = [home.start(*run) for _ in range(2)]
    completed = [end(process) for process in both]
    assert [done.returncode for done in completed] == [0, 0], [done.stderr for done in completed]
    lines = [line for done in completed for line in done.stdout.splitlines()]
    for stage in ("prune", "train cge", "evaluate cge"):
        assert sum(bool(re.match(rf"{stage} +done in", line)) for line in lines) == 1, stage
        assert sum(bool(re.match(rf"{stage} +unchanged, skipped", line)) for line in lines) == 1, stage
    assert [done.stderr for done in completed] == ["", ""]
    assert_complete(home)


@pytest.mark.slow
def test_killed_again_and_again_it_gets_there(new_home: Callable[[str], Any], run: list[str], kill: Any) -> None:
    alone, cut = new_home("alone"), new_home("cut")
    alone.done(*run, "--set", "cluster.workers=0")
    for step in (2, 9, 23, 31):
        process = cut.start(*run, "--set", "cluster.workers=1")
        cut.wait_for_step(process, step)
        time.sleep(random.uniform(0, 0.3))
        kill(process)
        process.communicate()
    cut.done(*run)
    assert cut.record()["weights_digest"] == alone.record()["weights_digest"]
    assert_complete(cut)
