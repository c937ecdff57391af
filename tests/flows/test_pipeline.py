"""The whole way in one command, and what a second run does again."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import mlflow.pytorch
import pytest
import torch

import configs
from deepzero_core.data import BatchSource, ImageStore

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def first(fresh_home: Any, tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    file = tmp_path_factory.mktemp("json") / "out.json"
    completed = fresh_home.done("run", "pipeline", "--config", "smoke", "--json", str(file))
    completed.json = json.loads(file.read_text())
    return completed


def test_it_prints_a_line_per_stage_a_table_and_where_everything_lies(
    fresh_home: Any, first: "subprocess.CompletedProcess[str]"
) -> None:
    assert first.stderr == ""
    done = [line.split(" done in ")[0].strip() for line in first.stdout.splitlines() if " done in " in line]
    sparse = "first-order-sparse-gradients"
    assert done == [
        "prepare",
        "prune",
        "train cge",
        "evaluate cge",
        f"train {sparse}",
        f"evaluate {sparse}",
        "certify cge",
        "report",
    ]
    (html,) = re.findall(r"^report +(/.*\.html)$", first.stdout, re.M)
    assert Path(html).is_file() and Path(html).is_relative_to(fresh_home.path)
    for label in ("MLflow run", "MLflow UI", "Prefect UI"):
        assert re.search(rf"^{label} +\S", first.stdout, re.M), label


def test_the_json_is_the_result_of_the_report(fresh_home: Any, first: Any) -> None:
    (result,) = (fresh_home.path / "reports").glob("*/result.json")
    assert json.loads(result.read_text()) == first.json
    folder = result.parent
    assert {"report.html", "report.md", "result.json"} <= {path.name for path in folder.iterdir()}
    assert len(list(folder.glob("*.png"))) >= 5
    text = (folder / "report.html").read_text()
    assert "<img" in text and "http://www" not in text


def test_mlflow_has_a_parent_with_a_child_per_stage(fresh_home: Any, first: Any) -> None:
    runs = fresh_home.runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    names = [run.info.run_name for run in children]
    assert names[:4] == ["prepare", "prune", "train cge", "evaluate cge"] and names[-1] == "certify cge"
    for tag in ("commit", "dirty", "torch", "python", "cores", "deepzero.flow"):
        assert tag in parent.data.tags or f"mlflow.source.git.{tag}" in parent.data.tags, tag
    assert parent.data.params["training.method"] == "cge"
    assert parent.data.params["data.name"] == "digits"
    trained = next(run for run in children if run.info.run_name == "train cge")
    steps = {
        key: [point.step for point in fresh_home.client().get_metric_history(trained.info.run_id, key) if point.step]
        for key in trained.data.metrics
    }
    per_step = [key for key in steps if steps[key] == [1, 2, 3, 4]]
    for word in ("loss", "accuracy", "learning_rate", "queries", "per_second", "gflop", "seconds", "memory"):
        assert any(word in key for key in per_step), word


def test_the_artifacts_are_there_and_the_configuration_feeds_back_in(fresh_home: Any, first: Any) -> None:
    client = fresh_home.client()
    by_name = {run.info.run_name: run.info.run_id for run in fresh_home.runs()}

    def artifacts(run_id: str, folder: str | None = None) -> set[str]:
        found = client.list_artifacts(run_id, folder)
        return {file.path for file in found if not file.is_dir}.union(
            *(artifacts(run_id, file.path) for file in found if file.is_dir)
        )

    trained, parent = by_name["train cge"], next(i for name, i in by_name.items() if name.startswith("pipeline"))
    assert {"history/history.jsonl", "model/weights.pt", "masks/masks-epoch-0000.pt"} <= artifacts(trained)
    assert {"pruning/layer_ratios.json", "pruning/scores.pt"} <= artifacts(by_name["prune"])
    assert "data/manifest.json" in artifacts(by_name["prepare"])
    assert "certification/certificates.parquet" in artifacts(by_name["certify cge"])
    assert {"config/experiment.yaml", "report/report.html", "report/result.json"} <= artifacts(parent)
    assert any(file.startswith("checkpoints/") for file in artifacts(trained)), "checkpoints are logged"
    file = client.download_artifacts(parent, "config/experiment.yaml")
    assert configs.load(file) == configs.load("smoke", flow="pipeline")


def test_the_logged_model_scores_what_the_result_says(fresh_home: Any, first: Any) -> None:
    (parent,) = [run for run in fresh_home.runs() if "mlflow.parentRunId" not in run.data.tags]
    (logged,) = fresh_home.client().search_logged_models([parent.info.experiment_id])
    model = mlflow.pytorch.load_model(str(Path(logged.artifact_location.removeprefix("file://"))))
    (store,) = (fresh_home.path / "data").iterdir()
    test = ImageStore.open(store).split("test")
    # The examples that were tested on, in [0, 1] as the logged model takes them.
    tested = BatchSource(test, batch_size=1, seed=0, mean=(0.0,), std=(1.0,), limit=64)
    ((images, labels),) = tested.ordered(64)
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
    (main, baseline) = first.json["methods"]
    assert accuracy == pytest.approx(main["test_accuracy"])
    assert parent.data.metrics["test/accuracy"] == pytest.approx(main["test_accuracy"])
    assert baseline["method"] == "first-order-sparse-gradients"


def test_a_change_of_the_certification_certifies_again_and_nothing_else(fresh_home: Any, first: Any) -> None:
    again = fresh_home.done(
        "run", "pipeline", "--config", "smoke", "--set", "certification.n=60", "--set", "cluster.workers=1"
    )
    assert [line.split(" done in ")[0].strip() for line in again.stdout.splitlines() if " done in " in line] == [
        "prepare",  # idempotent by itself: it finds its store
        "certify cge",
        "report",
    ]
    assert sum("unchanged, skipped" in line for line in again.stdout.splitlines()) == 5
    cached = [run for run in fresh_home.runs() if "deepzero.cached_from" in run.data.tags]
    assert len(cached) == 5
    assert all(run.data.metrics for run in cached), "their numbers are shown again"


@pytest.mark.slow
def test_an_identical_run_skips_every_stage(fresh_home: Any, first: Any) -> None:
    before = {run.info.run_id for run in fresh_home.runs()}
    again = fresh_home.done("run", "pipeline", "--config", "smoke")
    assert re.findall(r"^(.+?) +done in ", again.stdout, re.M) == ["prepare", "report"]
    new = [run for run in fresh_home.runs() if run.info.run_id not in before]
    assert sum("deepzero.cached_from" in run.data.tags for run in new) == 6
    assert len(list((fresh_home.path / "reports").iterdir())) >= 2, "it has a report of its own"
