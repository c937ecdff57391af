"""The loop of a training stage: history, metrics, checkpoints, progress. Killed at any moment it goes on from its last
checkpoint, to the same bits. Asked to stop, or left by black box or workers, it writes one where it stands."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prefect.logging import get_run_logger

from deepzero_core.errors import LostError, RequestError, WorkError
from deepzero_core.training import NonFiniteError, StepRecord, Trainer, check_state
from deepzero_core.training.checkpoint import load_newest, save_step
from infra.heeded import REQUESTS
from tasks.history import History, intact
from tasks.progress import Progress
from tasks.stage import Stage
from tasks.tracking import metrics_of

_CHECKPOINT_EVERY_S = 60.0


@dataclass
class Clock:
    """Wall time of the run, the time before a kill included."""

    before: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._started


@dataclass
class Loop:
    """A trainer at work in a stage.

    checkpoint_every: steps between checkpoints; a minute is never exceeded.
    line: what the history says of a step beside its record, from the record and the step's own seconds.
    evaluation: after a step, what the history says of the network, or None; the second argument: whether it is the
        last step.
    expected: seconds of a step by the cost model, where it has a say.
    """

    stage: Stage
    trainer: Trainer
    checkpoint_every: int
    line: Callable[[StepRecord, float], dict[str, Any]] = lambda record, seconds: {}
    evaluation: Callable[[StepRecord, bool], dict[str, Any] | None] = lambda record, last: None
    expected: float | None = None

    def __post_init__(self) -> None:
        self.clock = Clock(self._resume())

    def run(self) -> None:
        stage, trainer, total = self.stage, self.trainer, self.trainer.settings.steps
        history = History(stage.folder / "history.jsonl", last_step=trainer.step)
        for line in history.kept:
            stage.run.metrics(metrics_of(line), step=line["step"])
        saved_at = time.monotonic()
        with history, Progress(stage.title, total, trainer.step, self.expected) as progress:
            note, told = "", trainer.step
            try:
                for record, seconds in _timed(self._explained()):
                    self._say(history, self._step_line(record) | self.line(record, seconds))
                    last = record.step == total or not trainer.budget_left
                    found = self.evaluation(record, last)
                    if found is not None:
                        self._say(history, self._evaluation_line(record) | found)
                        note = _note(found)
                    if last or record.step % self.checkpoint_every == 0 or _overdue(saved_at):
                        self._save(history)
                        saved_at = time.monotonic()
                    told = record.step
                    progress.advance(f"loss {record.loss:.3f}{note}")
            except REQUESTS:
                # The trainer counts a step before it changes a parameter: here nothing is half done.
                if trainer.step == told:
                    self._checkpoint(history)
                raise
            except LostError as error:
                self._save(history)
                raise WorkError(
                    f"{error}; {stage.title} stands at step {trainer.step} of {total}, and the same command goes on "
                    "from there"
                ) from error
        stage.run.artifact(stage.folder / "history.jsonl", "history")
        newest = load_newest(stage.folder / "checkpoints").path
        if newest is not None:
            stage.run.artifact(newest, "checkpoints")

    def _say(self, history: History, line: dict[str, Any]) -> None:
        history.append(line)
        self.stage.run.metrics(metrics_of(line), step=line["step"])

    def _step_line(self, record: StepRecord) -> dict[str, Any]:
        accuracy = {} if record.accuracy is None else {"accuracy": record.accuracy}
        return {
            "kind": "step",
            "step": record.step,
            "epoch": record.epoch,
            "loss": record.loss,
            **accuracy,
            "learning_rate": record.learning_rate,
            "queries": record.queries,
            "seconds": self.clock.seconds,
        }

    def _evaluation_line(self, record: StepRecord) -> dict[str, Any]:
        return {
            "kind": "evaluation",
            "step": record.step,
            "epoch": record.epoch,
            "queries": record.queries,
            "seconds": self.clock.seconds,
        }

    def _save(self, history: History) -> None:
        self._checkpoint(history)
        self.stage.run.flush()

    def _checkpoint(self, history: History) -> None:
        """The stage's key is the digest of the configuration, the data and the code that the rest of the run needs."""
        history.flush()
        state = {
            "trainer": self.trainer.state(),
            "seconds": self.clock.seconds,
            "config_digest": self.stage.folder.name,
            "history": history.mark,
        }
        save_step(self.stage.folder / "checkpoints", self.trainer.step, state)

    def _resume(self) -> float:
        """Restore the newest good checkpoint, if there is one; the seconds already spent."""
        stage, logger = self.stage, get_run_logger()
        found = load_newest(stage.folder / "checkpoints", self._no_use)
        instead = "using an older one" if found.path else "the training begins anew"
        for damage in found.damaged:
            logger.warning("%s; %s", damage, instead)
            print(f"warning: {damage}; {instead}", file=sys.stderr, flush=True)
        if found.state is None:
            return 0.0
        if found.state["config_digest"] != stage.folder.name:
            raise RequestError(
                f"checkpoint {found.path} belongs to the configuration {found.state['config_digest']}, not to "
                f"{stage.folder.name}: move it away, and the training starts anew"
            )
        self.trainer.restore(found.state["trainer"])
        logger.info("resumed at step %d from %s", self.trainer.step, found.path)
        return float(found.state["seconds"])

    def _no_use(self, state: dict[str, Any]) -> str | None:
        """Why a checkpoint is of no use: what it is made of, and the history that belongs to it."""
        history = self.stage.folder / "history.jsonl"
        try:
            check_state(state.get("trainer", {}))
        except RequestError as error:
            return f"is none of a training: {error}"
        seconds = state.get("seconds")
        if not isinstance(state.get("config_digest"), str) or not isinstance(seconds, float) or not seconds >= 0:
            return "is none of a training"
        if "history" in state and not intact(history, state["history"]):
            return f"belongs to a history that {history} is no longer"
        return None

    def _explained(self) -> Iterator[StepRecord]:
        """The trainer's records; a loss that is no longer finite is reported with the last good checkpoint."""
        try:
            yield from self.trainer.run()
        except NonFiniteError as error:
            good = load_newest(self.stage.folder / "checkpoints").path
            where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise WorkError(f"{error}; {where}") from error


def _note(found: dict[str, Any]) -> str:
    """What the line of progress says of an evaluation."""
    accuracy, error = found.get("test_accuracy"), found.get("validation_mae")
    if error is not None:
        return f", validation MAE {error:.4f}"
    return "" if accuracy is None else f", test accuracy {accuracy:.1%}"


def _overdue(saved_at: float) -> bool:
    return time.monotonic() - saved_at > _CHECKPOINT_EVERY_S


def _timed(records: Iterator[StepRecord]) -> Iterator[tuple[StepRecord, float]]:
    """Each record with the seconds that its step took, without what is done between the steps."""
    while True:
        started = time.perf_counter()
        record = next(records, None)
        if record is None:
            return
        yield record, time.perf_counter() - started
