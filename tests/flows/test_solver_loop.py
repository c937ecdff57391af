"""A coarse solver is corrected in one command, by every method; killed it goes on; a program may crash."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.pytorch
import pytest
import torch

import configs
from configs.solver_loop import SolverLoop
from simulators import examples
from simulators.case_store import CaseStore
from tasks.couple import corrector_after
from tasks.loop_problem import Setting, open_simulator
from tasks.loop_validation import validation_error
from tasks.records import Cases, Corrected

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def first(fresh_home: Any) -> "subprocess.CompletedProcess[str]":
    completed: subprocess.CompletedProcess[str] = fresh_home.done("run", "solver-loop", "--config", "smoke")
    return completed


STAGES = [
    "generate",
    "pretrain corrector, seed 0",
    "share-out seed 0",
    "couple sol-zo, seed 0",
    "roll-out sol-zo, seed 0",
    "roll-out src",
    "couple non, seed 0",
    "roll-out non, seed 0",
    "couple sol-fo, seed 0",
    "roll-out sol-fo, seed 0",
    "couple sol-zo-split, seed 0",
    "roll-out sol-zo-split, seed 0",
]


def test_it_prints_a_line_per_stage_a_table_and_where_everything_lies(first: Any) -> None:
    assert first.stderr == ""
    # Where no step of a method is better than the corrector that it began with, that has been rolled out already.
    ends = re.findall(r"^(.+?) +(?:done in |unchanged, skipped)", first.stdout, re.M)
    assert ends == [*STAGES, "roll-out pre-trained, seed 0", "report"]
    assert re.search(r"^method +MAE +relative, % +spectrum +to SOL-FO", first.stdout, re.M)
    assert re.search(r"^report +/.*\.html$", first.stdout, re.M)


def test_the_result_for_machines(fresh_home: Any, first: Any) -> None:
    (file,) = (fresh_home.path / "reports").glob("*/result.json")
    result = json.loads(file.read_text())
    assert result["flow"] == "solver-loop"
    found = {method["method"]: method for method in result["methods"]}
    assert list(found) == ["sol-zo", "src", "non", "sol-fo", "sol-zo-split", "pre-trained"]
    assert {name: method["queries"] for name, method in found.items()} == {
        "sol-zo": [64], "src": [0], "non": [4], "sol-fo": [4], "sol-zo-split": [64], "pre-trained": [3],
    }  # fmt: skip
    # Two steps with m = 2 and two with m = 3, batches of 2, 16 queries; the first solver step is never repeated.
    assert found["sol-zo-split"]["solver_steps"] == [2 * 2 * (2 + 15) + 2 * 2 * (3 + 15 * 2)]
    assert all(len(method["mae_by_case"][0]) == 2 for method in found.values())
    assert {path.name for path in file.parent.iterdir() if path.suffix in (".png", ".gif")} == set(
        result["pictures"].values()
    )
    assert "animation" in result["pictures"]


def test_numbers_and_the_corrector_are_in_mlflow(fresh_home: Any, first: Any) -> None:
    (parent,) = [run for run in fresh_home.runs() if "mlflow.parentRunId" not in run.data.tags]
    assert {"test/mae_mean", "test/mae_std", "test/spectrum_error_mean", "cost/solver_steps"} <= set(
        parent.data.metrics
    )
    assert {"baseline/src/test/mae_mean", "simulator/steps_per_second"} <= set(parent.data.metrics)
    rolled = next(run for run in fresh_home.runs() if run.info.run_name == "roll-out sol-zo, seed 0")
    curve = fresh_home.client().get_metric_history(rolled.info.run_id, "test/mae")
    assert [point.step for point in curve] == list(range(1, 7))
    (logged,) = fresh_home.client().search_logged_models([parent.info.experiment_id])
    model = mlflow.pytorch.load_model(str(Path(logged.artifact_location.removeprefix("file://"))))
    assert model(torch.zeros(3, 4, 8, 8)).shape == (3, 2, 8, 8)


def test_every_training_ends_with_the_corrector_that_was_best_on_the_validation_cases(
    fresh_home: Any, first: Any
) -> None:
    loop = configs.load("smoke", flow="solver-loop")
    assert isinstance(loop, SolverLoop)
    cases = Cases.model_validate(fresh_home.record("generate"))
    assert cases.counts == {"train": 2, "validation": 1, "test": 2}
    for folder in (fresh_home.path / "stages" / "couple").iterdir():
        trained = Corrected.model_validate(json.loads((folder / "record.json").read_text())["record"])
        lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        tried = {line["step"]: line["validation_mae"] for line in lines if line["kind"] == "evaluation"}
        assert list(tried) == [2, 4]
        assert trained.validation_mae is not None and trained.validation_mae <= min(tried.values())
        assert tried.get(trained.kept_step, trained.validation_mae) == trained.validation_mae
        with open_simulator(loop) as simulator:
            setting = Setting(loop, cases, simulator)
            error = validation_error(setting, simulator, corrector_after(setting, trained.seed, trained))
        assert error == trained.validation_mae


def test_other_workers_and_more_frames_train_nothing_again(fresh_home: Any, first: Any) -> None:
    again = fresh_home.done("run", "solver-loop", "--config", "smoke", "--set", "rollout.frames=5")
    ends = dict(re.findall(r"^(.+?) +(done in|unchanged, skipped)", again.stdout, re.M))
    assert [stage for stage, end in ends.items() if end != "done in" and not stage.startswith("roll-out")] == [
        stage for stage in STAGES if not stage.startswith("roll-out")
    ]
    assert ends["roll-out sol-zo, seed 0"] == ends["roll-out src"] == ends["report"] == "done in"


def test_a_dry_run_says_what_it_would_cost(fresh_home: Any, first: Any) -> None:
    shown = fresh_home.done("run", "solver-loop", "--config", "smoke", "--dry-run").stdout
    assert re.search(r"cases +2 train, 1 validation, 2 test, 8 frames each", shown)
    assert re.search(r"corrector +small: 2,818 parameters", shown)
    assert re.search(r"training +2 steps with m = 2, 2 steps with m = 3; 2 simulations", shown)
    assert re.search(r"time +about sol-zo \d.*, non \d.*, sol-fo \d.*, sol-zo-split \d.* in all", shown, re.S)


def test_killed_it_ends_with_the_same_bits_and_workers_compute_the_same_cases(
    new_home: Callable[[str], Any], kill: Any
) -> None:
    run = ["run", "solver-loop", "--config", "smoke", "--set=baselines=[]", "--set=training.steps=24"]
    alone, cut = new_home("alone"), new_home("cut")
    alone.done(*run)
    first = cut.start(*run, "--set=cluster.workers=1")
    cut.wait_for_step(first, 6, "couple")
    kill(first)
    first.communicate()
    assert not (cut.stage("couple") / "record.json").exists()
    cut.done(*run)
    records = [home.record("couple") for home in (alone, cut)]
    for key in ("weights_digest", "queries", "steps", "kept_step", "validation_mae"):
        assert records[0][key] == records[1][key]
    stores = [CaseStore.open(home.stage("generate") / "cases", verify=True) for home in (alone, cut)]
    assert stores[0].digest == stores[1].digest
    told = [
        [json.loads(line) for line in (home.stage("couple") / "history.jsonl").read_text().splitlines()]
        for home in (alone, cut)
    ]
    steps, tried = (
        [[line for line in lines if line["kind"] == kind] for lines in told] for kind in ("step", "evaluation")
    )
    assert [[line["step"] for line in lines] for lines in steps] == [list(range(1, 25))] * 2
    errors = [[(line["step"], line["validation_mae"]) for line in lines] for lines in tried]
    assert errors[0] == errors[1] and [step for step, _ in errors[0]] == [12, 24]


OWN = """
import numpy as np
from torch import nn

def cases(number, skip, frames):
    '''A fine solution of Burgers' equation in one dimension, every fourth value of it.'''
    cells, fine, dt, nu = 24, 96, 0.1, 0.3
    phases = np.random.default_rng(number).uniform(0, 2 * np.pi, 3)
    x = np.arange(fine) * 2 * np.pi / fine
    u = 1 + sum(0.3 * np.sin((k + 1) * x + phase) for k, phase in enumerate(phases))
    h, kept = cells / fine, []
    for step in range((skip + frames) * 8):
        if step % 8 == 0 and step >= skip * 8:
            kept.append(u[::4].copy())
        slope = (np.roll(u, -1) - np.roll(u, 1)) / (2 * h)
        u = u + dt / 8 * (nu * (np.roll(u, 1) - 2 * u + np.roll(u, -1)) / h**2 - u * slope)
    return {"velocity": np.stack(kept)}, {}

def corrector():
    convolution = dict(kernel_size=5, padding=2, padding_mode="circular")
    return nn.Sequential(nn.Conv1d(1, 4, **convolution), nn.Tanh(), nn.Conv1d(4, 1, **convolution))
"""

EXTERNAL = """
name: external
simulator:
  kind: external
  field: velocity
  settings: {command: [PROGRAM, "0.3", "0.1", "40"], state_shapes: {velocity: [24]}, environment: {MARK: SEEN}}
cases: {function: "shallow:cases", train: [0, 1, 2, 3], test: [100, 101], skip: 2, frames: 30}
corrector: {name: "shallow:corrector"}
pruning: {method: uniform}
training:
  method: sol-zo
  steps: 60
  batch_size: 4
  queries: 49
  optimizer: {name: Adam, lr: 1e-2}
baselines: [src, sol-zo-split]
rollout: {frames: 25}
"""


@pytest.fixture
def own_program(new_home: Callable[[str], Any], tmp_path: Path) -> tuple[Any, Path, Path]:
    """A home where one's own program, cases and corrector are, the configuration, and what a crash leaves behind."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program, seen = tmp_path / "burgers1d", tmp_path / "crashed"
    source = Path(examples.__file__).parent / "burgers1d.c"
    subprocess.run([compiler, "-O2", "-o", str(program), str(source), "-lm"], check=True, timeout=60)
    (tmp_path / "shallow.py").write_text(OWN)
    config = tmp_path / "external.yaml"
    config.write_text(EXTERNAL.replace("PROGRAM", str(program)).replace("SEEN", str(seen)))
    home = new_home("external")
    home.environment["PYTHONPATH"] = str(tmp_path)
    return home, config, seen


def test_a_program_that_crashes_once_trains_a_corrector(own_program: tuple[Any, Path, Path]) -> None:
    home, config, seen = own_program
    completed = home.done("run", "solver-loop", "--config", str(config))
    assert seen.exists(), "the program has crashed, on purpose, at its 40th question"
    (file,) = (home.path / "reports").glob("*/result.json")
    result = json.loads(file.read_text())
    found = {method["method"]: method for method in result["methods"]}
    assert found["sol-zo"]["restarts"] == [1] and found["sol-zo"]["crashed"] == [0]
    assert "note: SOL-ZO: restarts of the program: 1." in completed.stdout
    assert found["sol-zo"]["mae"][0] < found["src"]["mae"][0]
    assert found["sol-zo-split"]["mae"][0] < found["src"]["mae"][0]
    assert found["src"]["spectrum_error"] is None


@pytest.mark.slow
def test_on_two_workers_a_program_makes_the_same_bits(
    own_program: tuple[Any, Path, Path], new_home: Callable[[str], Any]
) -> None:
    """Training and roll-out; on the workers the program crashes once in each training, as it does here."""
    home, config, seen = own_program
    other = new_home("external-workers")
    other.environment |= home.environment
    methods = {}
    for workers, place in ((0, home), (2, other)):
        seen.unlink(missing_ok=True)
        few = ["training.steps=3", "training.queries=17", "baselines=[src]", f"cluster.workers={workers}"]
        place.done("run", "solver-loop", "--config", str(config), *(part for one in few for part in ("--set", one)))
        assert seen.exists()
        (file,) = (place.path / "reports").glob("*/result.json")
        methods[workers] = {method["method"]: method for method in json.loads(file.read_text())["methods"]}
    alone, shared = (methods[workers]["sol-zo"] for workers in (0, 2))
    for key in ("mae", "mae_by_case", "queries", "solver_steps", "diverged", "crashed"):
        assert alone[key] == shared[key], key
    assert methods[0]["src"]["mae_by_case"] == methods[2]["src"]["mae_by_case"]
    # Two workers may come to their fortieth questions at the same moment.
    assert alone["restarts"] == [1] and shared["restarts"] in ([1], [2])
    weights = [next(place.path.glob("stages/couple/*/weights.pt")) for place in (home, other)]
    one, two = (torch.load(path, weights_only=True) for path in weights)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
