"""The training stage: interrupted and damaged runs end with the bits of a whole one, and every number is kept once."""

import json
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

import configs
from configs.schema import Experiment
from deepzero_core.data import prepare
from deepzero_core.errors import WorkError
from deepzero_core.training import Trainer
from deepzero_core.training.checkpoint import load, save
from tasks import train as training
from tasks.history import History, read
from tasks.records import Prepared, Pruned, Trained
from tasks.stage import Tracking
from tasks.tracking import Run, initialise, tracking_uri
from tasks.train import train

pytestmark = pytest.mark.usefixtures("prefect_server")

SMALL = (
    "data.batch_size=32",
    "data.crop_padding=1",
    "training.steps=12",
    "training.epochs=2",
    "training.checkpoint_every=3",
    "cluster.workers=0",
)
RATIOS = {"block1.conv.weight": 0.5, "linear.weight": 0.8}


@pytest.fixture(scope="module")
def tracking() -> Tracking:
    """A store that is made once; stages have homes of their own."""
    experiment = initialise("training")
    with Run.start(experiment, "parent") as run:
        return Tracking(experiment_id=experiment, run_id=run.run_id)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared.of_store(prepare("digits", home=tmp_path_factory.mktemp("digits")).path)


@pytest.fixture
def in_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking: Tracking, prepared: Prepared
) -> Callable[..., Trained]:
    """Run the stage in a home of that name."""

    def run(name: str, *overrides: str, method: str = "cge") -> Trained:
        monkeypatch.setenv("DEEPZERO_HOME", str(tmp_path / name))
        experiment = configs.load("smoke", [*SMALL, *overrides])
        # Outside a flow there is no run that Prefect could send the log to.
        with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):
            return train(tracking, experiment, prepared, pruned(tmp_path), method)

    return run


def pruned(folder: Path) -> Pruned:
    scores = {
        "block1.conv.weight": torch.arange(36.0).view(4, 1, 3, 3),
        "linear.weight": torch.arange(40.0).view(10, 4),
    }
    torch.save(scores, folder / "scores.pt")
    return Pruned(
        folder=folder, method="random", sparsity=0.6, ratios=RATIOS, sizes={}, coordinates=0, queries=0, seconds=0.0
    )


def steps_of(history: Path) -> tuple[list[int], list[int]]:
    """Steps and evaluated steps, in the order they stand there."""
    lines = list(read(history))
    return (
        [line["step"] for line in lines if line["kind"] == "step"],
        [line["step"] for line in lines if line["kind"] == "evaluation"],
    )


def same_numbers(one: Path, other: Path) -> bool:
    """Whether two histories tell the same, times and memory aside."""
    speed = ("step_seconds", "predicted_seconds", "share_of_peak")
    clocks = ("seconds", "queries_per_second", "peak_memory_bytes", *speed)

    def told(path: Path) -> list[dict[str, Any]]:
        return [{name: value for name, value in line.items() if name not in clocks} for line in read(path)]

    return told(one) == told(other)


class Interrupted(BaseException):
    """Stands for a kill that comes right after a step was recorded."""


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    append = History.append

    def until(self: History, line: dict[str, Any]) -> None:
        append(self, line)
        if line["step"] == step:
            raise Interrupted

    monkeypatch.setattr(History, "append", until)


@pytest.mark.parametrize("method", ["cge", "rge", "forward-gradient", "first-order-sparse-weights"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(
    in_home: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole = in_home("whole", method=method)
    for step in (2, 8):  # before the first checkpoint, and between two
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt_after(step, patch)
            in_home("cut", method=method)
    resumed = in_home("cut", method=method)
    assert resumed.weights_digest == whole.weights_digest
    assert (resumed.steps, resumed.queries) == (whole.steps, whole.queries) == (12, whole.queries)
    assert steps_of(resumed.history) == (list(range(1, 13)), [8, 12])
    assert same_numbers(resumed.history, whole.history)
    weights = [torch.load(trained.weights, weights_only=True) for trained in (whole, resumed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("where", "kept"), [("_check_finite", 7), ("_keep_masked_weights_at_zero", 6)], ids=["estimating", "updating"]
)
def test_stopped_it_keeps_the_step_that_it_stands_at_unless_that_is_half_done(
    where: str, kept: int, in_home: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step 8; the checkpoints that are due are those of steps 3 and 6."""
    whole = in_home("whole")
    original, calls = getattr(Trainer, where), 0

    def stop(self: Trainer, *arguments: Any) -> None:
        nonlocal calls
        original(self, *arguments)
        calls += self.step > 0 or where == "_check_finite"
        if calls == 8:
            raise TerminationSignal(signal=signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(TerminationSignal):
        patch.setattr(Trainer, where, stop)
        in_home("cut")
    names = sorted(path.stem for path in (tmp_path / "cut").glob("stages/train/*/checkpoints/*.ckpt"))
    assert names[-1] == f"step-{kept:08d}"
    resumed = in_home("cut")
    assert resumed.weights_digest == whole.weights_digest
    assert same_numbers(resumed.history, whole.history)


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bits(
    in_home: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = in_home("whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(8, patch)
        in_home("cut")
    (newest,) = (tmp_path / "cut").glob("stages/train/*/checkpoints/step-00000006.ckpt")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    resumed = in_home("cut")
    assert re.search(
        rf"^warning: checkpoint {re.escape(str(newest))} is damaged: .*; using an older one$",
        capsys.readouterr().err,
        re.M,
    )
    assert resumed.weights_digest == whole.weights_digest
    assert same_numbers(resumed.history, whole.history)


def test_mlflow_has_every_number_of_a_resumed_run_once(
    in_home: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, tracking: Tracking
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(8, patch)
        in_home("cut")
    trained = in_home("cut")
    client = MlflowClient(tracking_uri=tracking_uri())
    completion = json.loads((trained.folder / "record.json").read_text())
    run = client.get_run(completion["run_id"])
    runs = client.search_runs([tracking.experiment_id], order_by=["attributes.start_time"])
    cut, whole = [r for r in runs if r.data.tags.get("deepzero.stage_key") == trained.folder.name][-2:]
    assert (cut.info.status, whole.info.status) == ("KILLED", "FINISHED")
    assert whole.info.run_id == run.info.run_id
    lines = [line for line in read(trained.history) if line["kind"] == "step"]
    for name in ("loss", "queries", "learning_rate"):
        (key,) = [key for key in run.data.metrics if key.rpartition("/")[2] == name and "test" not in key]
        points = client.get_metric_history(run.info.run_id, key)
        assert max(Counter(point.step for point in points).values()) == 1
        assert {point.step: point.value for point in points if point.step} == {
            line["step"]: pytest.approx(line[name]) for line in lines
        }


def test_steps_and_run_are_predicted(in_home: Callable[..., Trained], tracking: Tracking) -> None:
    trained = in_home("predicted")
    lines = [line for line in read(trained.history) if line["kind"] == "step"]
    for line in lines:
        assert 0 < line["predicted_seconds"] < 60 and 0 < line["step_seconds"] < 60
        assert 0 < line["share_of_peak"] < 5, "Winograd's products are fewer than those that are counted"
    run = MlflowClient(tracking_uri=tracking_uri()).get_run(
        json.loads((trained.folder / "record.json").read_text())["run_id"]
    )
    assert run.data.metrics["cost/predicted_step_seconds"] == pytest.approx(lines[-1]["predicted_seconds"])
    assert run.data.metrics["cost/predicted_run_seconds"] == pytest.approx(12 * lines[0]["predicted_seconds"])
    assert run.data.metrics["cost/share_of_peak"] == pytest.approx(lines[-1]["share_of_peak"])


def test_what_the_cost_model_does_not_know_is_not_predicted(in_home: Callable[..., Trained]) -> None:
    lines = [line for line in read(in_home("exact", method="first-order").history) if line["kind"] == "step"]
    assert len(lines) == 12
    assert not any(name in line for line in lines for name in ("step_seconds", "predicted_seconds", "share_of_peak"))


def test_a_run_begun_before_there_were_predictions_goes_on(
    in_home: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(8, patch)
        in_home("old")
    (history,) = (tmp_path / "old").glob("stages/train/*/history.jsonl")
    old = [json.loads(line) for line in history.read_text().splitlines()]
    for line in old:
        for name in ("step_seconds", "predicted_seconds", "share_of_peak"):
            line.pop(name, None)
    history.write_text("".join(json.dumps(line) + "\n" for line in old))
    for path in history.parent.glob("checkpoints/*.ckpt"):  # nor did checkpoints know their history
        state = load(path)
        del state["history"]
        save(path, state)
    lines = [line for line in read(in_home("old").history) if line["kind"] == "step"]
    assert ["share_of_peak" in line for line in lines] == [False] * 6 + [True] * 6


def test_workers_or_none_give_the_same_bits(in_home: Callable[..., Trained]) -> None:
    alone = in_home("alone")
    spread = in_home("spread", "cluster.workers=2")
    assert alone.weights_digest == spread.weights_digest
    assert alone.folder.name == spread.folder.name, "who evaluates is no part of what is asked for"
    assert same_numbers(alone.history, spread.history)


def test_a_loss_that_explodes_names_step_checkpoint_and_remedy(in_home: Callable[..., Trained], tmp_path: Path) -> None:
    settings = ("training.optimizer.lr=1e30", "training.schedule.name=constant", "training.checkpoint_every=1")
    with pytest.raises(WorkError) as failure:
        in_home("exploding", *settings)
    message = str(failure.value)
    assert "\n" not in message
    assert re.search(r"^step \d+: .* \(learning rate 1e\+30\); try a smaller training\.optimizer\.lr", message)
    checkpoint = Path(message.rpartition("the last good checkpoint is ")[2])
    assert checkpoint.is_relative_to(tmp_path) and checkpoint.is_file()
    with pytest.raises(WorkError, match="there is no checkpoint yet"):
        in_home("exploding at once", *settings[:2])


def test_a_budget_that_pays_for_some_steps_ends_the_run_there(in_home: Callable[..., Trained]) -> None:
    whole = in_home("whole")
    cost = whole.queries // whole.steps
    trained = in_home("short", f"training.query_budget={5 * cost - 1}")
    assert (trained.steps, trained.queries) == (4, 4 * cost)
    assert steps_of(trained.history) == ([1, 2, 3, 4], [4]), "evaluated where it ends"
    dear = in_home("dear", f"training.query_budget={5 * cost - 1}", method="first-order")
    assert dear.steps == 12, "the budget is of zeroth-order queries"


def test_a_history_is_cut_at_the_checkpoint_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    with History(path, last_step=0) as history:
        for step in range(1, 6):
            history.append({"step": step})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    with History(path, last_step=3) as history:
        assert [line["step"] for line in history.kept] == [1, 2, 3]
        history.append({"step": 4})
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]


def test_a_kill_while_the_history_is_cut_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.jsonl"
    with History(path, last_step=0) as history:
        for step in range(1, 4):
            history.append({"step": step})

    def killed(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Interrupted):
            History(path, last_step=2)
    assert [line["step"] for line in read(path)] == [1, 2, 3]


def test_the_settings_of_the_trainer_are_those_of_the_experiment(prepared: Prepared, tmp_path: Path) -> None:
    experiment: Experiment = configs.load("smoke", [*SMALL, "training.query_budget=500", "pruning.sparsity=0.6"])
    batches = training.problem_of(experiment, prepared).build_batches()
    for method, ratios, masks, budget in (
        ("cge", RATIOS, False, 500),
        ("rge", None, False, 500),
        ("first-order", None, False, None),
        ("first-order-sparse-gradients", RATIOS, False, None),
        ("first-order-sparse-weights", None, True, None),
    ):
        settings = training.settings_of(experiment, batches, pruned(tmp_path), method)
        assert (settings.ratios, settings.weight_masks is not None, settings.query_budget) == (ratios, masks, budget)
        assert settings.steps == settings.schedule.steps == 12
