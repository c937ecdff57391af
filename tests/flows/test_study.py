"""A study: every point once, the failing one told and the others done, what is done not done again."""

import csv
import json
import re
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.feather
import pytest

pytestmark = pytest.mark.timeout(600)

# A learning rate that no network survives is a point that fails while it is at work, not one that is refused.
CONFIG = """
name: rates
flow: classify
base:
  data: {name: digits, batch_size: 32, train_limit: 256, test_limit: 64}
  model: {name: cnn, depth: 1, width: 4}
  pruning: {method: none}
  training: {method: first-order, epochs: 1, steps: 6, schedule: {name: constant, warmup_epochs: 0}}
  cluster: {workers: 0}
vary: {training.optimizer.lr: [0.1, 1e30]}
seeds: [0, 1]
"""


@pytest.fixture(scope="module")
def studied(
    fresh_home: Any, tmp_path_factory: pytest.TempPathFactory, prefect_server: None
) -> "tuple[Any, Path, subprocess.CompletedProcess[str]]":
    from prefect.settings import PREFECT_API_URL

    fresh_home.environment["PREFECT_API_URL"] = PREFECT_API_URL.value()
    file = tmp_path_factory.mktemp("study") / "rates.yaml"
    file.write_text(CONFIG)
    return fresh_home, file, fresh_home.run("run", "study", "--config", str(file))


def test_the_others_are_done_and_the_failure_is_told(studied: Any) -> None:
    _, _, completed = studied
    assert completed.returncode == 1, completed.stdout + completed.stderr
    assert re.search(r"^0\.1 +2 +0\.\d+ ± ", completed.stdout, re.M)
    assert re.search(r"^1e\+30 +0 of 2 +– ", completed.stdout, re.M)
    failed = re.findall(r"^note: failed: training\.optimizer\.lr=1e\+30, seed (\d): step \d: ", completed.stdout, re.M)
    assert failed == ["0", "1"]
    assert "Traceback" not in completed.stdout + completed.stderr


def test_every_run_is_shown_below_the_study_in_mlflow(studied: Any) -> None:
    home, _, _ = studied
    runs = {run.info.run_id: run for run in home.runs()}
    (study,) = [run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags]
    assert (study.data.tags["deepzero.flow"], study.info.status) == ("study", "FINISHED")
    assert study.data.metrics["study/failed"] == 2 and study.data.metrics["study/runs"] == 4
    points = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == study.info.run_id]
    assert [(p.data.params["training.optimizer.lr"], p.data.params["seed"], p.info.status) for p in points] == [
        ("0.1", "0", "FINISHED"),
        ("0.1", "1", "FINISHED"),
        ("1e+30", "0", "FAILED"),
        ("1e+30", "1", "FAILED"),
    ]
    for point in points:
        (flow,) = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == point.info.run_id]
        assert flow.data.tags["deepzero.flow"] == "classify"
        if point.info.status == "FINISHED":
            assert point.data.metrics["test/accuracy"] == flow.data.metrics["test/accuracy"]


def test_the_numbers_are_those_of_the_runs(studied: Any) -> None:
    completed = studied[2]
    (report,) = re.findall(r"^report +(\S+)/report\.html$", completed.stdout, re.M)
    result = json.loads((Path(report) / "result.json").read_text())
    done = [run for run in result["runs"] if run["error"] is None]
    for run in done:
        own = json.loads((Path(run["report"]) / "result.json").read_text())
        assert run["metrics"]["test/accuracy"] == own["methods"][0]["test_accuracy"]
    accuracies = [run["metrics"]["test/accuracy"] for run in done]
    row = dict(zip(result["table"]["columns"], result["table"]["rows"][0], strict=True))
    assert row["accuracy"] == f"{statistics.mean(accuracies):.4g} ± {statistics.stdev(accuracies):.2g}"
    table = pyarrow.feather.read_table(Path(report) / "study.arrow").to_pydict()
    assert table["training.optimizer.lr"] == [0.1, 0.1, 1e30, 1e30]
    assert table["test/accuracy"] == [*accuracies, None, None]
    assert [bool(error) for error in table["error"]] == [False, False, True, True]
    with (Path(report) / "study.csv").open(newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0", "1", "0", "1"]
    assert len(list(Path(report).glob("*.png"))) == 3


def test_what_is_done_is_not_done_again(studied: Any) -> None:
    home, file, _ = studied
    again = home.run("run", "study", "--config", str(file), "--set", "seeds=[0, 1, 2]", "--set", "vary={}")
    assert again.returncode == 0, again.stderr
    assert re.findall(r"^point as it is, (\d) +unchanged, skipped$", again.stdout, re.M) == ["0", "1"], (
        "0.1 is the base's"
    )
    assert re.findall(r"^point as it is, (\d) +done in", again.stdout, re.M) == ["2"]
    more = home.run(
        *("run", "study", "--config", str(file), "--set", "seeds=[0, 1, 2]"),
        *("--set", "vary={training.optimizer.lr: [0.1]}"),
    )
    assert more.returncode == 0, more.stderr
    skipped = re.findall(r"^point training\.optimizer\.lr=0\.1, (\d) +unchanged, skipped$", more.stdout, re.M)
    assert skipped == ["0", "1", "2"], "by what was done, not by how it was written"
    assert re.search(r"^0\.1 +3 ", more.stdout, re.M)


@pytest.fixture
def report(studied: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`deepzero report RUN` in the home of the study: (exit status, stdout, stderr)."""
    from flows.cli import main

    monkeypatch.setenv("DEEPZERO_HOME", str(studied[0].path))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    def call(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["report", *arguments])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


def test_report_finds_a_run_by_id_name_and_file(studied: Any, report: Callable[..., Any]) -> None:
    home, _, completed = studied
    (place,) = re.findall(r"^report +(\S+)/report\.html$", completed.stdout, re.M)
    folder = Path(place)
    for run in (folder.name, folder.name[:10], str(folder / "result.json"), place):
        status, out, err = report(run)
        assert (status, err) == (1, ""), "it had failures"
        assert f"{place}/report.html" in out and "note: failed: training.optimizer.lr=1e+30, seed 1" in out
    newest = max((home.path / "reports").glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    for run in ((), ("latest",)):
        assert str(newest.parent) in report(*run)[1]
    studies = [run for run in home.runs() if run.info.run_name == "study rates"]
    assert f"{studies[-1].info.run_id}/report.html" in report("study rates")[1], "of one name, the newest"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("study rats", "no run is called 'study rats' or has an id that begins like this; did you mean 'study rates'?"),
        ("nowhere/result.json", "nowhere/result.json: there is no result.json; name a run, a result file or"),
        ("ffffffff", "no run is called 'ffffffff' or has an id that begins like this; the newest are "),
    ],
)
def test_a_report_that_is_not_there(run: str, message: str, report: Callable[..., Any]) -> None:
    status, out, err = report(run)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")


def test_a_study_of_which_nothing_came_is_a_failure(new_home: Callable[[str], Any], tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(CONFIG.replace("[0.1, 1e30]", "[1e30]").replace("seeds: [0, 1]", "seeds: [0]"))
    completed = new_home("home").run("run", "study", "--config", str(file))
    assert completed.returncode == 1
    told, error = completed.stderr.splitlines()
    assert re.match(r"ERROR: point training\.optimizer\.lr=1e\+30, seed 0 failed: step \d: ", told)
    assert re.match(r"error: no run of the study came to anything; the first failed with: step \d: ", error)
