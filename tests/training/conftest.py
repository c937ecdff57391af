"""What the tests of the training loop share: batches of digits, a network with every kind of state, settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepzero_core.data import BatchSource, ImageStore, prepare
from deepzero_core.training import Schedule, TrainingSettings


class Small(nn.Module):
    """Convolution, BatchNorm (buffers), dropout (random numbers), linear: whatever a step has to carry on."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(27, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv(x)))
        return self.linear(self.dropout(hidden).flatten(1))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore.open(prepare("digits", home=tmp_path_factory.mktemp("digits")).path)


@pytest.fixture
def batches(digits: ImageStore) -> BatchSource:
    """Three steps per epoch."""
    manifest = digits.manifest
    return BatchSource(digits.split("train"), batch_size=16, seed=5, mean=manifest.mean, std=manifest.std, limit=48)


@pytest.fixture
def network() -> Callable[..., nn.Module]:
    """Builds the same network every time."""

    def build(dropout: float = 0.3) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return Small(dropout)

    return build


@pytest.fixture
def settings() -> Callable[..., TrainingSettings]:
    def build(steps: int = 7, **changes: Any) -> TrainingSettings:
        arguments = {
            "steps": steps,
            "schedule": Schedule(0.1, steps, min(2, steps)),
            "seed": 3,
            "optimizer": "SGD",
            "optimizer_arguments": {"momentum": 0.9, "weight_decay": 5e-4},
        }
        return TrainingSettings(**{**arguments, **changes})

    return build


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parent / "golden"
