"""What is shown in Prefect's pages; a server that does not take it costs nothing but a line in the log."""

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.artifacts import Gauge, show_link, show_report, slug
from tasks.beside import beside
from tasks.records import Reported

RUN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def reported(tmp_path: Path) -> Reported:
    """A report with a table and a picture."""
    table = {"columns": ["method", "accuracy"], "rows": [["CGE", "97%"], ["First order", "98%"]]}
    (tmp_path / "result.json").write_text(json.dumps({"table": table, "pictures": {"learning_curves": "curves.png"}}))
    (tmp_path / "report.md").write_text("# Title\n\n![Learning curves](curves.png)\n\n| a |\n|---|\n| 1 |\n")
    return Reported(
        folder=tmp_path,
        html=tmp_path / "report.html",
        markdown=tmp_path / "report.md",
        result=tmp_path / "result.json",
    )


@flow
def show(reported: Reported, title: str) -> None:
    show_link("http://127.0.0.1:5999/#/x")
    show_report(reported, title=title, run_id=RUN)


def shown() -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        return {str(artifact.key): artifact for artifact in client.read_latest_artifacts()}


def test_pictures_are_shown_where_a_server_has_them(
    prefect_server: None, reported: Reported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:5999")
    show(reported, "Title")
    found = shown()
    address = f"http://127.0.0.1:5999/get-artifact?path=report%2Fcurves.png&run_uuid={RUN}"
    assert (found["picture-learning-curves"].type, found["picture-learning-curves"].data) == ("image", address)
    assert f"![Learning curves]({address})" in found["report"].data
    assert json.loads(found["result"].data) == [
        {"method": "CGE", "accuracy": "97%"},
        {"method": "First order", "accuracy": "98%"},
    ]
    assert found["mlflow-run"].data == "[MLflow run](http://127.0.0.1:5999/#/x)"
    assert "secret" not in str(found)


def test_without_a_server_for_them_there_are_no_broken_pictures(
    prefect_server: None, reported: Reported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    show(reported, "Local")
    assert "![" not in shown()["report"].data


@pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow:FutureWarning")  # a flow has a client already
def test_a_server_that_is_gone_is_a_line_in_the_log(reported: Reported, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        with caplog.at_level(logging.WARNING, "tasks"), temporary_settings({PREFECT_API_URL: nobody}):
            show_link("http://127.0.0.1:5000/#/x")
            show_report(reported, title="Title", run_id=RUN)
    said = [record.getMessage().partition(": ")[0] for record in caplog.records]
    assert said == ["Prefect did not take the link to MLflow", "Prefect did not take the report"]


def test_progress_is_shown_in_a_task_and_at_its_end(prefect_server: None) -> None:
    @task
    def work() -> None:
        gauge = Gauge("train first-order, seed 3")
        for percent in (0.0, 10.0, 20.0):  # at once: only the first is worth a request
            gauge.show(percent)
        beside(bool).result()
        assert shown()["progress-train-first-order-seed-3"].data == 0
        gauge.show(100.0, last=True)

    @flow
    def run() -> None:
        work()

    run()
    assert shown()["progress-train-first-order-seed-3"].data == 100


def test_outside_a_task_nothing_is_asked_of_prefect() -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        Gauge("train").show(50.0)


def test_keys_are_what_prefect_takes() -> None:
    assert slug("picture certified_accuracy (σ = 0.25)") == "picture-certified-accuracy-0-25"
