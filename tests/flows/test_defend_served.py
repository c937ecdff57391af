"""A classifier behind MLflow's scoring server that dies in mid-run: nothing is lost, and the bits are the same."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Serving
from torch import nn

from deepzero_core.models import CNN, Normalised

pytestmark = pytest.mark.timeout(900)

CONFIG = """
name: served
data: {name: digits, batch_size: 16, train_limit: 64, test_limit: 16}
victim:
  kind: mlflow
  cache: true
  settings: {url: "URL", patience: 4}
denoiser: {name: dncnn, depth: 3, width: 4}
pretraining: {steps: 5}
pruning: {method: uniform}
training: {method: deepzero, queries: 12, steps: 12, checkpoint_every: 2}
certification: {n0: 5, n: 20, examples: 2, batch_size: 20}
cluster: {workers: 0}
"""


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    torch.manual_seed(0)
    network: nn.Module = Normalised(CNN(1, 10, (8, 8), depth=1, width=4), [0.3], [0.3]).eval()
    server = Serving.of(network, torch.rand(2, 1, 8, 8), tmp_path_factory.mktemp("serving"))
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def run(tmp_path: Path, serving: Serving) -> list[str]:
    file = tmp_path / "served.yaml"
    file.write_text(CONFIG.replace("URL", serving.url))
    return ["run", "defend", "--config", str(file)]


def outcome(home: Any) -> tuple[str, bytes]:
    """The digest of the trained denoiser, and the table of certificates."""
    return home.record("defend")["weights_digest"], (home.stage("certify") / "certificates.parquet").read_bytes()


@pytest.fixture
def expected(new_home: Callable[[str], Any], run: list[str]) -> tuple[str, bytes]:
    alone = new_home("alone")
    alone.done(*run)
    return outcome(alone)


def test_gone_for_long_it_stops_with_a_checkpoint_and_goes_on_when_started_again(
    new_home: Callable[[str], Any], run: list[str], serving: Serving, end: Any, expected: tuple[str, bytes]
) -> None:
    stopped = new_home("stopped")
    first = stopped.start(*run)
    stopped.wait_for_step(first, 2, "defend")
    serving.kill()
    completed = end(first)
    assert completed.returncode == 1
    (sentence,) = [line for line in completed.stderr.splitlines() if line.startswith("error:")]
    assert re.search(r"defend deepzero, seed 0 stands at step \d+ of 12, and the same command goes on", sentence)
    assert "Traceback" not in completed.stderr
    serving.start()
    stopped.done(*run)
    assert outcome(stopped) == expected


@pytest.mark.slow
def test_gone_for_a_moment_it_is_waited_for(
    new_home: Callable[[str], Any], run: list[str], serving: Serving, end: Any, expected: tuple[str, bytes]
) -> None:
    waited = new_home("waited")
    patient = [*run, "--set", f"victim.settings={json.dumps({'url': serving.url, 'patience': 120})}"]
    second = waited.start(*patient)
    waited.wait_for_step(second, 2, "defend")
    serving.kill()
    time.sleep(1)
    serving.start()
    assert end(second).returncode == 0
    assert outcome(waited) == expected
