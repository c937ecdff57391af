"""Every test session has state folders of its own: nothing is read from or written to the user's."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

_SESSION = Path(tempfile.mkdtemp(prefix="deepzero-tests-"))

# Set before anything imports torch, Prefect or MLflow, and inherited by the processes that tests start.
os.environ.update(
    {
        "DEEPZERO_HOME": str(_SESSION / "home"),
        "PREFECT_HOME": str(_SESSION / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{_SESSION / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(_SESSION / "matplotlib"),
        # Reproducible sums, and two cores are not shared out to many threads.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
)
for _variable in ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_PROFILE", "DEEPZERO_DEBUG"):
    os.environ.pop(_variable, None)

# Times vary on shared machines: pytest-timeout catches what hangs.
settings.register_profile("deepzero", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("deepzero")


def pytest_unconfigure() -> None:
    shutil.rmtree(_SESSION, ignore_errors=True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder for one test."""
    path = tmp_path / "home"
    monkeypatch.setenv("DEEPZERO_HOME", str(path))
    return path


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A temporary Prefect server for the tests that run flows."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        yield
