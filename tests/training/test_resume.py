"""A run that was cut at any step and goes on from its checkpoint ends with the bits of one that was not."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepzero_core import draw_masks
from deepzero_core.data import BatchSource
from deepzero_core.errors import RequestError
from deepzero_core.models import build_model
from deepzero_core.training import (
    CGESource,
    FirstOrderSource,
    ForwardGradientSource,
    RGESource,
    Schedule,
    Trainer,
    TrainingSettings,
)
from deepzero_core.training.checkpoint import load, save

# torch.func.jvp loads scripted decompositions when it is used for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Build = Callable[..., nn.Module]
MakeSettings = Callable[..., TrainingSettings]
STEPS = 7
RATIOS = {"conv.weight": 0.5, "linear.weight": 0.8}
SOURCES: dict[str, Callable[[], Any]] = {
    "cge": lambda: CGESource(F.cross_entropy),
    "cge-central": lambda: CGESource(F.cross_entropy, difference="central"),
    "rge": lambda: RGESource(F.cross_entropy, directions=4, seed=2),
    "forward-gradient": lambda: ForwardGradientSource(F.cross_entropy, directions=4, seed=2),
    "first-order": lambda: FirstOrderSource(F.cross_entropy),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    "Adam": {"amsgrad": True},
}


def stored(state: dict[str, Any], path: Path) -> dict[str, Any]:
    save(path, state)
    return load(path)


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("source", "how"),
    [
        *((name, "dense") for name in SOURCES),
        *((name, "sparse") for name in ("cge", "first-order")),
        ("first-order", "sparse-weights"),
    ],
)
def test_resumed_at_any_step_it_ends_with_the_same_bits(
    network: Build,
    batches: BatchSource,
    settings: MakeSettings,
    tmp_path: Path,
    source: str,
    how: str,
    optimizer: str,
) -> None:
    """The network has dropout and BatchNorm; every restart has a new process's state: a fresh trainer and source."""
    changes: dict[str, Any] = {"optimizer": optimizer, "optimizer_arguments": OPTIMIZERS[optimizer]}
    if how == "sparse":
        changes["ratios"] = RATIOS
    if how == "sparse-weights":
        masks = draw_masks(RATIOS, network(), torch.Generator().manual_seed(0))
        changes["weight_masks"] = {name: masks[name] for name in RATIOS}
    plan = settings(steps=STEPS, **changes)

    def fresh() -> Trainer:
        return Trainer(network(), batches, SOURCES[source](), plan)

    whole = fresh()
    states, records = [stored(whole.state(), tmp_path / "0.ckpt")], []
    for record in whole.run():
        records.append(record)
        states.append(stored(whole.state(), tmp_path / f"{record.step}.ckpt"))
    assert len({record.loss for record in records}) == STEPS
    for step, state in enumerate(states):
        torch.rand(step)  # the global generator of the resumed process stands anywhere
        resumed = fresh()
        resumed.restore(state)
        assert list(resumed.run()) == records[step:]
        assert_same(resumed.state(), states[-1])


def test_dropout_differs_from_step_to_step(network: Build, batches: BatchSource, settings: MakeSettings) -> None:
    """Otherwise the test above would show nothing about random numbers."""
    lines = []
    for seed in (1, 1, 2):
        trainer = Trainer(network(dropout=0.5), batches, SOURCES["first-order"](), settings(seed=seed))
        lines.append([record.loss for record in trainer.run()])
    assert lines[0] == lines[1] != lines[2]


@pytest.fixture
def trained(network: Build, batches: BatchSource, settings: MakeSettings) -> dict[str, Any]:
    trainer = Trainer(network(), batches, SOURCES["first-order"](), settings(ratios=RATIOS))
    next(trainer.run())
    return trainer.state()


def test_a_state_of_another_seed_is_refused(
    network: Build, batches: BatchSource, settings: MakeSettings, trained: dict[str, Any]
) -> None:
    other = Trainer(network(), batches, SOURCES["first-order"](), settings(seed=4, ratios=RATIOS))
    with pytest.raises(RequestError, match="the checkpoint is of seed 3, this run of seed 4"):
        other.restore(trained)


def test_a_state_of_other_ratios_is_refused(
    network: Build, batches: BatchSource, settings: MakeSettings, trained: dict[str, Any]
) -> None:
    for ratios in ({"conv.weight": 0.5, "linear.weight": 0.7}, None):
        other = Trainer(network(), batches, SOURCES["first-order"](), settings(ratios=ratios))
        with pytest.raises(RequestError, match="written with other layer-wise pruning ratios"):
            other.restore(trained)


def test_a_state_of_another_network_is_refused(
    batches: BatchSource, settings: MakeSettings, trained: dict[str, Any]
) -> None:
    module = build_model(
        "cnn", in_channels=1, num_classes=10, image_size=(8, 8), depth=1, width=3, arguments={}, seed=0
    )
    with pytest.raises(RequestError, match="the checkpoint is of another network"):
        Trainer(module, batches, SOURCES["first-order"](), settings()).restore(trained)


def test_a_state_is_small_and_plain(trained: dict[str, Any]) -> None:
    """What is saved can be read by a process that has none of this project's classes."""
    buffer = io.BytesIO()
    torch.save(trained, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True), trained)


def test_golden_trajectory(batches: BatchSource, golden: Path) -> None:
    """Ten recorded steps of sparse CGE on digits. DEEPZERO_REFRESH_GOLDEN=1 records them anew, when they should change.

    The tolerance is float32's after ten steps on another processor; a change of method shows in the first digits.
    """
    module = build_model(
        "cnn", in_channels=1, num_classes=10, image_size=(8, 8), depth=2, width=4, arguments={}, seed=0
    )
    plan = TrainingSettings(
        steps=10,
        schedule=Schedule(0.1, 10, 2),
        seed=0,
        optimizer_arguments={"momentum": 0.9, "weight_decay": 5e-4},
        ratios={"block1.conv.weight": 0.5, "block2.conv.weight": 0.7},
    )
    trainer = Trainer(module, batches, CGESource(F.cross_entropy), plan)
    lines = [
        {"loss": record.loss, "accuracy": record.accuracy, "queries": record.queries, "rate": record.learning_rate}
        for record in trainer.run()
    ]
    norms = {name: value.norm().item() for name, value in module.named_parameters()}
    seen = {"steps": lines, "norms": norms}
    path = golden / "cge-digits.json"
    if os.environ.get("DEEPZERO_REFRESH_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(path.read_text(encoding="utf-8"))
    assert len(lines) == len(expected["steps"]) == 10
    for line, recorded in zip(lines, expected["steps"], strict=True):
        assert line == pytest.approx(recorded, rel=2e-3)
    assert norms == pytest.approx(expected["norms"], rel=2e-3, abs=1e-5)
