"""What a Dask worker holds of a training, and what it answers: see `infra.forward`."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from distributed import Reschedule, Worker, WorkerPlugin, get_worker
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core.data import BatchSource
from deepzero_core.errors import WorkError
from deepzero_core.estimators.cge import slope
from deepzero_core.perturb import BasePass, Chunk, Evaluator, prepare
from deepzero_core.training import Batch
from infra.dask_memory import forget_names
from infra.doors import Door, GivenUpError, door_in, mine
from infra.packed import packed, unpacked
from infra.plugins import Absent
from infra.problem import Images, Problem
from infra.ranges import Range


@dataclass(frozen=True)
class StepState:
    """θ of one step, packed: parameters and buffers as arrays; and the batch it is evaluated on."""

    name: str
    """Unique to this θ on this batch: what is held under it is never that of another step."""
    epoch: int
    index: int
    random_seed: int
    theta: bytes

    @classmethod
    def of(
        cls, batch: Batch, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], random_seed: int
    ) -> "StepState":
        theta = packed((arrays_of(parameters), arrays_of(buffers)))
        return cls(uuid4().hex, batch.epoch, batch.index, random_seed, theta)


@dataclass(frozen=True)
class Unperturbed:
    """l(θ), the outputs [B, K], and the buffers as the pass leaves them."""

    loss: np.ndarray
    outputs: np.ndarray
    buffers: dict[str, np.ndarray]

    @classmethod
    def of(cls, base: BasePass) -> "Unperturbed":
        return cls(base.loss.cpu().numpy(), base.outputs.cpu().numpy(), arrays_of(base.buffers))


@dataclass(frozen=True)
class Answer:
    """ĝ at the coordinates of every chunk of a range, and its seconds; of the first range, what the base pass gives."""

    slopes: list[np.ndarray]
    seconds: list[float]
    unperturbed: Unperturbed | None = None


class ForwardWorker(WorkerPlugin):
    """A worker's module, data and engine, built by its first task; set up again when Dask replaces the worker.

    doors: the coordinator's folder, in which a worker that sees it opens a door of its own, once a task has built what
    it takes to answer; None where it asks by tasks alone.
    """

    def __init__(self, name: str, problem: Problem, doors: str | None, images: Images | None = None) -> None:
        self.name = name
        self._problem, self._doors, self._images = problem, doors, images
        self._device = torch.device(problem.device)
        self._built: tuple[nn.Module, BatchSource] | None = None
        self._evaluator: Evaluator | None = None
        self._base: tuple[str, BasePass] | None = None
        self._drawn: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None
        self.given_up: set[Any] = set()
        self._door: Door | None = None
        self._state: StepState | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardWorker, (self.name, self._problem, self._doors, self._images)

    def setup(self, worker: Worker) -> None:
        torch.set_num_threads(1)
        # A worker that somebody else has started may have several threads; engine and random state are for one.
        self._turn = threading.Lock()
        self._path = self._doors and door_in(Path(self._doors), worker.address)

    def teardown(self, worker: Worker) -> None:
        if self._door is not None:
            self._door.close()

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        """Note which tasks of this worker nobody waits for any more: another worker was faster."""
        if start == "executing" and finish in ("cancelled", "released", "forgotten"):
            self.given_up.add(key)
        elif finish in ("executing", "resumed"):
            self.given_up.discard(key)

    def answer_at_once(self, question: bytes, given_up: Callable[[], bool]) -> bytes:
        """As `evaluate`, through the door: the name of the step, its state where that is new to the lane, the range."""
        name, state, part = unpacked(question)
        if state:
            self._state = unpacked(state)
        if self._state is None or self._state.name != name:
            raise WorkError("a Dask worker was asked for a step whose parameters it was not sent")
        return packed(self.answer(self._state, *unpacked(part), given_up))

    def draw_ahead(self) -> None:
        """The batch of the next step, while the coordinator makes its θ."""
        with self._turn:
            if self._built and self._drawn:
                (epoch, index), steps = self._drawn[0], self._built[1].steps_per_epoch
                self._batch(*divmod(epoch * steps + index + 1, steps))

    def answer(self, state: StepState, part: Range, first: bool, given_up: Callable[[], bool]) -> Answer:
        """What a range is asked for. GivenUpError: it is not wanted any more."""
        with self._turn:
            base = self._base_of(state)
            found, seconds = [], []
            for name, indices in part.chunks:
                if given_up():
                    raise GivenUpError
                began = time.perf_counter()
                found.append(self._slope(base, name, indices))
                seconds.append(time.perf_counter() - began)
            return Answer(found, seconds, Unperturbed.of(base) if first else None)

    def _slope(self, base: BasePass, name: str, indices: np.ndarray) -> np.ndarray:
        problem, chunk = self._problem, Chunk(name, torch.from_numpy(indices.copy()).to(self._device))
        assert self._evaluator is not None
        found = slope(self._evaluator, base, chunk, problem.mu, problem.difference, problem.precision)
        return found.cpu().numpy()

    def _base_of(self, state: StepState) -> BasePass:
        """The base pass of a step, kept until the next: every range of the step reads it."""
        if self._base is None or self._base[0] != state.name:
            self.given_up.clear()
            forget_names()
            if self._built is None:
                module = self._problem.build_module().train().to(self._device)
                self._built = module, self._problem.build_batches(self._images)
            module = self._built[0]
            inputs, targets = (part.to(self._device) for part in self._batch(state.epoch, state.index))
            if self._evaluator is None:
                self._evaluator = prepare(module, inputs, targets, F.cross_entropy)
            torch.manual_seed(state.random_seed)
            parameters, buffers = (tensors_of(arrays, self._device) for arrays in unpacked(state.theta))
            self._base = state.name, self._evaluator.base(parameters, buffers, inputs, targets)
            if self._door is None and self._path and mine(self._path.parent):
                with suppress(OSError):  # without a door it gets tasks
                    self._door = Door(self._path, self.answer_at_once, self.draw_ahead)
        return self._base[1]

    def _batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        assert self._built is not None
        if self._drawn is None or self._drawn[0] != (epoch, index):
            self._drawn = (epoch, index), self._built[1].batch(epoch, index)
        return self._drawn[1]


def tensors_of(arrays: Mapping[str, np.ndarray], device: torch.device | None = None) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()).to(device) for name, array in arrays.items()}


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


def evaluate(part: bytes, state: StepState, plugin: str) -> bytes | Absent:
    """part: a range, and whether it is the first of the step, packed. Its answer, packed."""
    worker = get_worker()
    forward: ForwardWorker | None = worker.plugins.get(plugin)
    if forward is None:
        return Absent.PLUGIN
    key = worker.get_current_task()
    try:
        return packed(forward.answer(state, *unpacked(part), lambda: key in forward.given_up))
    except GivenUpError:
        raise Reschedule from None  # Dask forgets it, or begins again if it has changed its mind
