"""A classifier is defended in one command; what comes of it is certified, reported, logged and can be loaded."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import mlflow.pyfunc
import pandas as pd
import pytest
from serving import Serving

from deepzero_core.data import ImageStore, to_tensor

pytestmark = pytest.mark.timeout(600)

METHODS = ("deepzero", "none", "fo-ds", "zo-ds", "zo-ae-ds", "deepzero-split")


@pytest.fixture(scope="module")
def first(fresh_home: Any) -> "subprocess.CompletedProcess[str]":
    completed: subprocess.CompletedProcess[str] = fresh_home.done("run", "defend", "--config", "smoke")
    return completed


def test_it_prints_a_line_per_stage_a_table_and_where_everything_lies(fresh_home: Any, first: Any) -> None:
    assert first.stderr == ""
    done = re.findall(r"^(.+?) +done in ", first.stdout, re.M)
    assert done == [
        "prepare",
        "victim",
        "pretrain denoiser, seed 0",
        "share-out seed 0",
        "defend deepzero, seed 0",
        "certify deepzero, seed 0",
        "certify none, seed 0",
        "defend fo-ds, seed 0",
        "certify fo-ds, seed 0",
        "defend zo-ds, seed 0",
        "certify zo-ds, seed 0",
        "pretrain autoencoder, seed 0",
        "defend zo-ae-ds, seed 0",
        "certify zo-ae-ds, seed 0",
        "defend deepzero-split, seed 0",
        "certify deepzero-split, seed 0",
        "report",
    ]
    assert re.search(r"^method +r = 0 +r = 0.25 +r = 0.5 +r = 0.75 +ACR", first.stdout, re.M)
    assert re.search(r"^report +/.*\.html$", first.stdout, re.M)


def test_the_result_for_machines(fresh_home: Any, first: Any) -> None:
    (file,) = (fresh_home.path / "reports").glob("*/result.json")
    result = json.loads(file.read_text())
    assert result["flow"] == "defend"
    assert [method["method"] for method in result["methods"]] == list(METHODS)
    spent = {method["method"]: (method["queries"], method["images_asked"]) for method in result["methods"]}
    # Three steps of 16 queries on 32 images, also at a latent of 8 numbers.
    for method in ("deepzero", "zo-ds", "zo-ae-ds", "deepzero-split"):
        assert spent[method] == ([48], [48 * 32]), method
    assert spent["none"] == ([0], [0]) and spent["fo-ds"] == ([3], [0])
    assert {path.name for path in file.parent.glob("*.png")} == set(result["pictures"].values())
    assert set(result["pictures"]) == {"certified-accuracy", "images", "stability-loss"}


def test_the_defended_classifier_can_be_loaded_and_certifies(fresh_home: Any, first: Any) -> None:
    (parent,) = [run for run in fresh_home.runs() if "mlflow.parentRunId" not in run.data.tags]
    (logged,) = fresh_home.client().search_logged_models([parent.info.experiment_id])
    model = mlflow.pyfunc.load_model(str(Path(logged.artifact_location.removeprefix("file://"))))
    (store,) = (fresh_home.path / "data").iterdir()
    images = to_tensor(ImageStore.open(store).split("test").images[:3]).numpy()
    params = {"n0": 10, "n": 40, "alpha": 0.05, "seed": 7}
    found = model.predict(images, params=params)
    assert list(found.columns) == ["label", "class", "radius", "abstained", "p_lower"]
    assert len(found) == 3
    pd.testing.assert_frame_equal(found, model.predict(images, params=params))
    for row in found.itertuples():
        assert row.abstained == (row.label == -1) == (row.radius == 0.0) == (row.p_lower <= 0.5)
    # One image at a time gives the same, by its number in the question.
    pd.testing.assert_frame_equal(found[:1], model.predict(images[:1], params=params))


def test_the_defended_classifier_can_be_served(fresh_home: Any, first: Any, tmp_path: Path) -> None:
    (parent,) = [run for run in fresh_home.runs() if run.info.run_name.startswith("defend defend-smoke")]
    logged = fresh_home.client().search_logged_models([parent.info.experiment_id])[0]
    server = Serving(logged.artifact_location.removeprefix("file://"), tmp_path)
    question = {"inputs": [[[[0.5] * 8] * 8]] * 2, "params": {"n0": 5, "n": 20, "alpha": 0.05}}
    try:
        answer = httpx.post(f"{server.url}/invocations", json=question, timeout=60, trust_env=False).json()
        wrong = httpx.post(f"{server.url}/invocations", json={"inputs": [[[0.5]]]}, timeout=60, trust_env=False)
    finally:
        server.kill()
    assert [set(row) for row in answer["predictions"]] == [{"label", "class", "radius", "abstained", "p_lower"}] * 2
    assert wrong.status_code == 400


def test_numbers_are_in_mlflow(fresh_home: Any, first: Any) -> None:
    (parent,) = [run for run in fresh_home.runs() if "mlflow.parentRunId" not in run.data.tags]
    metrics = parent.data.metrics
    assert metrics["cost/queries"] == 48 and metrics["cost/images_asked"] == 48 * 32
    assert {"victim/test_accuracy", "certified_accuracy/radius_0.25", "certified_accuracy/average_radius"} <= set(
        metrics
    )
    assert "baseline/zo-ds/certified_accuracy/radius_0" in metrics
    trained = next(run for run in fresh_home.runs() if run.info.run_name == "defend deepzero, seed 0")
    losses = fresh_home.client().get_metric_history(trained.info.run_id, "train/loss")
    assert [point.step for point in losses if point.step] == [1, 2, 3]


def test_other_settings_of_the_certification_train_nothing_again(fresh_home: Any, first: Any) -> None:
    again = fresh_home.done(
        "run", "defend", "--config", "smoke", "--set", "certification.n=60", "--set", "baselines=[]",
        "--set", "cluster.workers=1",
    )  # fmt: skip
    done = re.findall(r"^(.+?) +done in ", again.stdout, re.M)
    assert done == ["prepare", "certify deepzero, seed 0", "report"]


BOX = """
import numpy as np

def answer(images):
    '''Ten classes by brightness, as probabilities.'''
    scores = np.stack([images.mean((1, 2, 3)) * k - k * k / 40 for k in range(10)], 1)
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)

def nonsense(images):
    return np.full((len(images), 10), 0.3)

def three(images):
    return np.full((len(images), 3), 1 / 3)
"""


def own(folder: Path, function: str, budget: int) -> list[str]:
    """A run against a function of the user's own, whose images are counted."""
    (folder / "brightness.py").write_text(BOX)
    settings = {"function": f"brightness:{function}"}
    changes = {
        "victim.kind": "function",
        "victim.answers": "probabilities",
        "victim.settings": json.dumps(settings),
        "victim.budget": budget,
        "baselines": "[]",
        "training.steps": 6,
    }
    return ["run", "defend", "--config", "smoke", *(f"--set={key}={value}" for key, value in changes.items())]


def test_a_budget_that_is_used_up_stops_the_run_and_a_larger_one_goes_on(new_home: Any, tmp_path: Path) -> None:
    home, whole = new_home("small"), new_home("whole")
    home.environment["PYTHONPATH"] = whole.environment["PYTHONPATH"] = str(tmp_path)
    # 256 + 32 images for the labels, 200 for ZO-GraSP, 16 * 32 for a step.
    stopped = home.run(*own(tmp_path, "answer", 256 + 32 + 200 + 16 * 32 * 3 + 100))
    assert stopped.returncode == 1
    (sentence,) = [line for line in stopped.stderr.splitlines() if line.startswith("error:")]
    assert re.search(
        r"more than is left of the query budget: \d+ of \d+ are spent; defend deepzero, seed 0 stands", sentence
    )
    home.done(*own(tmp_path, "answer", 1_000_000))
    whole.done(*own(tmp_path, "answer", 1_000_000))
    assert home.record("defend")["weights_digest"] == whole.record("defend")["weights_digest"]


@pytest.mark.parametrize(
    ("function", "words"),
    [("nonsense", "probabilities .* sum"), ("three", "answers 3 classes, but the data has 10")],
)
def test_a_classifier_that_answers_nonsense_is_one_sentence(
    new_home: Any, tmp_path: Path, function: str, words: str
) -> None:
    home = new_home("nonsense")
    home.environment["PYTHONPATH"] = str(tmp_path)
    refused = home.run(*own(tmp_path, function, 1_000_000))
    assert refused.returncode == 2
    (sentence,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert re.search(words, sentence)
    assert "Traceback" not in refused.stderr
