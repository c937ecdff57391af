"""The installed versions really run together: no resolver tells."""

import subprocess
import sys
from pathlib import Path

import pytest


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_keeps_to_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == 1


def test_torchvision_imports_beside_this_torch() -> None:
    # In a process of its own: an earlier import in this one would hide the difficulty.
    code = """
from deepzero_core.data.torchvision_compat import import_torchvision
import_torchvision()
import torch, torchvision.datasets, torchvision.transforms, torchvision.models
print(torchvision.models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape[1])
"""
    assert run_python(code).strip() == "1000"


@pytest.mark.usefixtures("prefect_server")
def test_prefect_server_imports_and_answers() -> None:
    import prefect.server.api.server
    from prefect import get_client

    assert callable(prefect.server.api.server.create_app)
    with get_client(sync_client=True) as client:
        # Null fields in the body of this very call are what later FastAPI versions refuse.
        assert len(client.read_flow_runs(limit=1)) <= 1
        assert client.api_healthcheck() is None


def test_mlflow_sqlite_store_opens_and_logs(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("smoke", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment)
    client.log_metric(run.info.run_id, "loss", 0.5, step=3)
    client.log_text(run.info.run_id, "text", "note.txt")
    client.set_terminated(run.info.run_id)

    (metric,) = client.get_metric_history(run.info.run_id, "loss")
    assert (metric.value, metric.step) == (0.5, 3)
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    assert (tmp_path / "artifacts" / run.info.run_id / "artifacts" / "note.txt").read_text() == "text"
