"""MLflow's own scoring server, serving a model that this project has logged."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import mlflow
import pytest
from mlflow import MlflowClient
from torch import Tensor, nn

from tasks.tracking import Run, initialise, tracking_uri


def _path() -> str:
    """MLflow looks for uvicorn on the path, where an environment that is not activated has none."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


class Serving:
    """`mlflow models serve` of a model on a port of its own; it can die and come back."""

    def __init__(self, model: str, folder: Path, *, store: str = "") -> None:
        self._model, self._folder, self._store = model, folder, store
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    @classmethod
    def of(cls, network: nn.Module, example: Tensor, folder: Path) -> "Serving":
        """A network as the champion of a registered model."""
        return cls("models:/digits@champion", folder, store=_registered(network, example, folder))

    def start(self) -> None:
        command = f"models serve -m {self._model} --env-manager local --host 127.0.0.1 --workers 1 --port"
        with (self._folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command.split(), str(self._port)],
                env={**os.environ, "MLFLOW_TRACKING_URI": self._store, "PATH": _path()},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.1)
        pytest.fail(f"the server did not start: {(self._folder / 'log').read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """It and the workers that it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def _registered(network: nn.Module, example: Tensor, folder: Path) -> str:
    """The address of a store where the network is the champion of the registered model "digits"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPZERO_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with Run.start(initialise("serving"), "model") as run:
            uri = run.model(network, example, "classifier")
        store = tracking_uri()
        # The registry looks the logged model up by MLflow's global address.
        patch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", store)
        client = MlflowClient(tracking_uri=store, registry_uri=store)
        client.create_registered_model("digits")
        client.create_model_version("digits", source=uri, run_id=run.run_id)
        client.set_registered_model_alias("digits", "champion", "1")
    return store
