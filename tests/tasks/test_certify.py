"""The certification stage: the same table however it came about, and its numbers where people look for them."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

import configs
from deepzero_core.data import prepare
from deepzero_core.smoothing import Certificate
from infra.certificates import Certificates
from tasks.certify import certify
from tasks.problem import problem_of
from tasks.records import Certified, Prepared, Trained
from tasks.stage import Tracking
from tasks.tracking import Run, initialise, tracking_uri

pytestmark = pytest.mark.usefixtures("prefect_server")

SETTINGS = ("certification.n0=40", "certification.n=200", "certification.examples=12", "certification.batch_size=100")


@pytest.fixture(scope="module")
def tracking() -> Tracking:
    experiment = initialise("certification")
    with Run.start(experiment, "parent") as run:
        return Tracking(experiment_id=experiment, run_id=run.run_id)


@pytest.fixture
def in_home(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tracking: Tracking
) -> Callable[..., Certified]:
    """Run the stage on a network of random weights in a home of that name."""
    prepared = Prepared.of_store(prepare("digits", home=tmp_path / "data").path)

    def run(name: str, *overrides: str) -> Certified:
        monkeypatch.setenv("DEEPZERO_HOME", str(tmp_path / name))
        experiment = configs.load("smoke", [*SETTINGS, *overrides])
        weights = tmp_path / "weights.pt"
        torch.save(problem_of(experiment, prepared).build_module().state_dict(), weights)
        trained = Trained(
            method="cge", folder=tmp_path, history=tmp_path, weights=weights, weights_digest="0", sparse=False,
            steps=0, queries=0, seconds=0.0,
        )  # fmt: skip
        # Outside a flow there is no run that Prefect could send the log to.
        with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):
            return certify(tracking, experiment, prepared, trained)

    return run


class Killed(BaseException):
    """Stands for a kill that comes right after a certificate was kept."""


def test_straight_interrupted_or_on_workers_the_table_is_the_same(
    in_home: Callable[..., Certified], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = in_home("straight")
    keep = Certificates.add

    def until(self: Certificates, number: int, certificate: Certificate) -> None:
        keep(self, number, certificate)
        if number in (2, 7):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Certificates, "add", until)
        for _ in range(2):
            with pytest.raises(Killed):
                in_home("cut")
    resumed, spread = in_home("cut"), in_home("spread", "cluster.workers=1")
    assert resumed.table.read_bytes() == straight.table.read_bytes() == spread.table.read_bytes()
    aside = {"table": straight.table, "seconds": straight.seconds}
    assert resumed.model_copy(update=aside) == straight == spread.model_copy(update=aside)
    assert (straight.samples, straight.saved) == (12 * 240, 0)
    capsys.readouterr()
    assert in_home("cut") == resumed
    assert "unchanged, skipped" in capsys.readouterr().out


def test_adaptive_mode_is_told_with_what_it_saved(in_home: Callable[..., Certified], tracking: Tracking) -> None:
    certified = in_home("adaptive", "certification.adaptive=true", "certification.radii=[0.0, 0.1]")
    rows = pq.read_table(certified.table).to_pylist()
    assert all(row["samples"] + row["saved"] == 240 for row in rows)
    assert certified.saved == sum(row["saved"] for row in rows) > 0
    assert certified.share_saved == pytest.approx(certified.saved / (12 * 240))
    runs = MlflowClient(tracking_uri=tracking_uri()).search_runs([tracking.experiment_id], max_results=100)
    metrics = next(run.data.metrics for run in runs if run.data.metrics.get("samples_saved", 0) > 0)
    assert metrics["samples_saved"] == certified.saved
    assert metrics["samples"] == certified.samples
    assert metrics["average_certified_radius"] == pytest.approx(certified.average_radius)
    assert metrics["certified_accuracy/radius_0.1"] == certified.accuracy_at[0.1]
