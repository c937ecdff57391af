"""Reference runs on disk: what is read is what was written, and damage is seen. Batches of them, and growing loops."""

from pathlib import Path

import pytest
import torch
from torch import nn

from deepzero_core.errors import RequestError
from deepzero_core.training.sources import Batch
from simulators.case_store import CaseStore, write_cases
from simulators.cases import Case
from simulators.function import FunctionSimulator
from simulators.methods import FieldCoupling, FirstOrderLoop, Loop, Windows
from simulators.methods.batches import Curriculum, Shuffled, training_windows


def case(number: int, dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(number)
    u = torch.randn(6, 4, generator=generator, dtype=dtype)
    return Case(f"case {number}", {"u": u}, {"inflow": torch.arange(6, dtype=torch.float32)})


def store(folder: Path) -> CaseStore:
    splits = {"train": [case(0), case(1, torch.float32)], "test": [case(2)]}
    return write_cases(folder / "cases", splits, {"made": "up"})


def test_cases_come_back_as_they_were(tmp_path: Path) -> None:
    written = store(tmp_path)
    first, second = CaseStore.open(tmp_path / "cases", verify=True).cases("train")
    assert first.name == "case 0"
    assert torch.equal(first.frames["u"], case(0).frames["u"]) and first.frames["u"].dtype == torch.float64
    assert torch.equal(second.frames["u"], case(1, torch.float32).frames["u"])
    assert torch.equal(first.params["inflow"], case(0).params["inflow"]) and first.params["inflow"].shape == (6,)
    assert store(tmp_path).digest == written.digest == CaseStore.open(tmp_path / "cases").digest


def test_damage_is_seen(tmp_path: Path) -> None:
    store(tmp_path)
    file = tmp_path / "cases" / "train-1.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RequestError, match=r"train-1\.arrow is not as it was written"):
        CaseStore.open(tmp_path / "cases", verify=True)
    file.write_bytes(content[:-1])
    with pytest.raises(RequestError, match="missing or cut short"):
        CaseStore.open(tmp_path / "cases")
    manifest = tmp_path / "cases" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("up", "down"))
    with pytest.raises(RequestError, match="damaged or of another version"):
        CaseStore.open(tmp_path / "cases")


def loop(steps: int) -> Loop:
    def halved(state: dict, params: dict) -> dict:
        return {"u": state["u"] / 2 + params["inflow"][:, None]}

    simulator = FunctionSimulator(halved, state_shapes={"u": (4,)}, param_shapes={"inflow": ()}, differentiable=True)
    return Loop(simulator, FieldCoupling("u"), steps)


def test_every_window_comes_once_before_any_comes_again() -> None:
    windows = Windows(loop(2), [case(0), case(1)])
    batches = Shuffled(windows, 2, seed=3, redraw=5)
    inputs = torch.cat([batches.batch(*divmod(step, 5))[0] for step in range(len(windows) // 2)])
    assert len(inputs.unique(dim=0)) == len(windows)
    assert torch.equal(batches.batch(1, 2)[0], Shuffled(windows, 2, seed=3).batch(7, 0)[0]), "whatever the redraw"
    with pytest.raises(RequestError, match="a batch of 9 cannot be filled from 8"):
        Shuffled(windows, 9, seed=0)


def test_a_shorter_loop_sees_the_beginning_of_a_window() -> None:
    stages = [(2, 1), (1, 3)]
    curriculum = Curriculum(loop(3), stages, FirstOrderLoop)
    windows = training_windows(loop(3), stages, [case(0), case(1)])
    batches = Shuffled(windows, 2, 0, 1, curriculum.shorten)
    corrector = nn.Conv1d(1, 1, 3, padding=1).double()
    lengths = []
    for step in range(4):
        inputs, targets = batches.batch(step, 0)
        found = curriculum.estimate(corrector, Batch.of(step, step, 0, inputs.double(), targets.double()), None)
        lengths.append(targets.shape[1])
        assert inputs.shape[1] == 4 + targets.shape[1]
        whole, wholly = Shuffled(windows, 2, 0).batch(step, 0)
        short = loop(lengths[-1])
        beginning = Batch.of(0, 0, 0, whole[:, : 4 + short.steps].double(), wholly[:, : short.steps].double())
        wanted = FirstOrderLoop(short).estimate(corrector, beginning, None)
        assert torch.equal(found.gradients["weight"], wanted.gradients["weight"])
    assert lengths == [1, 1, 3, 3]
