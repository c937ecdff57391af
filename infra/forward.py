"""Forward evaluation on Dask workers: what a worker holds, what a task does, and the coordinator's side of a step.

    step        one small task holds θ for the step; every worker fetches it once, as a dependency of its ranges
    base        another: the unperturbed loss, outputs and buffers, of a worker that needs them for its ranges anyway
    range       a fixed list of chunks; its result is loss differences, nothing else
    worker      keeps module, data and traced engine, built by a plugin that runs again on every replacement

Ranges follow from the coordinates and the memory budget, never from the number of workers, and every worker computes
on one thread: one worker, many workers, or a worker lost on the way give the same bits. What a lost worker held is
computed again from the task graph, θ included.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from distributed import CancelledError, Client, Future, KilledWorker, Worker, WorkerPlugin, get_worker
from distributed import wait as wait_for
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import GradientEstimate
from deepzero_core.data import Augmentation, BatchSource, ImageStore
from deepzero_core.errors import LostError
from deepzero_core.estimators.cge import queries, slope, work
from deepzero_core.models import build_model
from deepzero_core.perturb import BasePass, Chunk, Evaluator, prepare
from deepzero_core.perturb.coordinates import count, resolve, scatter
from deepzero_core.perturb.cost import Cost, total
from deepzero_core.perturb.evaluator import chunks
from deepzero_core.perturb.machine import NOMINAL
from deepzero_core.perturb.objective import state_of
from deepzero_core.training import Batch
from deepzero_core.training.sources import Coordinates

log = logging.getLogger(__name__)

RANGES = 24
"""Tasks per step: enough for a dozen workers to end together, few enough that sending them costs next to nothing."""


@dataclass(frozen=True)
class Problem:
    """What a worker needs to build module and data by itself: plain values and the folder of the data store."""

    store: Path
    batches: Mapping[str, Any]
    """Keyword arguments of `BatchSource` without split, mean and std."""
    model: Mapping[str, Any]
    """Keyword arguments of `build_model`."""
    mu: float
    difference: str
    memory: int
    precision: str = "float32"

    def build_batches(self) -> BatchSource:
        store = ImageStore.open(self.store)
        options = dict(self.batches)
        augmentation = Augmentation(**options.pop("augmentation"))
        return BatchSource(
            store.split("train"),
            mean=store.manifest.mean,
            std=store.manifest.std,
            augmentation=augmentation,
            **options,
        )

    def build_module(self) -> nn.Module:
        return build_model(**self.model)


@dataclass(frozen=True)
class StepState:
    """θ of one step, with the batch it is evaluated on. Arrays, so that it travels without a copy."""

    name: str
    """Unique to this θ on this batch: what is held under it is never that of another step."""
    epoch: int
    index: int
    parameters: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    random_seed: int


@dataclass(frozen=True)
class Range:
    """Chunks that one task evaluates: (parameter name, flat indices)."""

    chunks: tuple[tuple[str, np.ndarray], ...]


@dataclass(frozen=True)
class Unperturbed:
    """l(θ), the outputs [B, K], and the buffers as the pass leaves them."""

    loss: np.ndarray
    outputs: np.ndarray
    buffers: dict[str, np.ndarray]


class ForwardWorker(WorkerPlugin):
    """A worker's module, data and engine; set up again when Dask replaces the worker."""

    def __init__(self, name: str, problem: Problem) -> None:
        self.name = name
        self._problem = problem
        self._base: tuple[str, BasePass] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardWorker, (self.name, self._problem)

    def setup(self, worker: Worker) -> None:
        torch.set_num_threads(1)
        self._module = self._problem.build_module().train()
        self._batches = self._problem.build_batches()
        self._evaluator: Evaluator | None = None
        # A worker that somebody else has started may have several threads; engine and random state are for one.
        self._turn = threading.Lock()

    def differences(self, state: StepState, work: Range) -> list[np.ndarray]:
        """ĝ at the coordinates of every chunk of the range."""
        with self._turn:
            base, problem = self._base_of(state), self._problem
            assert self._evaluator is not None
            return [
                slope(
                    self._evaluator,
                    base,
                    Chunk(name, torch.from_numpy(indices.copy())),
                    problem.mu,
                    problem.difference,
                    problem.precision,
                ).numpy()
                for name, indices in work.chunks
            ]

    def unperturbed(self, state: StepState) -> "Unperturbed":
        """What the base pass of a step gives."""
        with self._turn:
            base = self._base_of(state)
            return Unperturbed(base.loss.numpy(), base.outputs.numpy(), _arrays(base.buffers))

    def _base_of(self, state: StepState) -> BasePass:
        """The base pass of a step, kept until the next: every range of the step reads it."""
        if self._base is None or self._base[0] != state.name:
            inputs, targets = self._batches.batch(state.epoch, state.index)
            if self._evaluator is None:
                self._evaluator = prepare(self._module, inputs, targets, F.cross_entropy)
            torch.manual_seed(state.random_seed)
            base = self._evaluator.base(_tensors(state.parameters), _tensors(state.buffers), inputs, targets)
            self._base = state.name, base
        return self._base[1]


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


def _hold(value: Any) -> Any:
    """A task whose only purpose is that its result is cached on workers and rebuilt from the graph when lost."""
    return value


def _evaluate_base(plugin: str, state: StepState) -> Unperturbed | None:
    forward: ForwardWorker | None = get_worker().plugins.get(plugin)
    return None if forward is None else forward.unperturbed(state)


def _evaluate(number: int, plugin: str, state: StepState, ranges: Sequence[Range]) -> list[np.ndarray]:
    forward: ForwardWorker | None = get_worker().plugins.get(plugin)
    if forward is None:
        return []  # the run was stopped and took its plugin away: nobody reads this
    return forward.differences(state, ranges[number])


@dataclass
class DistributedCGE:
    """Coordinate-wise estimation over Dask workers; a `GradientSource`. Use as a context manager."""

    client: Client
    problem: Problem
    timeout_s: float = 60.0
    _name: str = field(default_factory=lambda: uuid4().hex)
    _evaluator: Evaluator | None = None
    _ranges: tuple[Coordinates | None, list[Range], Future, Cost] | None = None

    def __enter__(self) -> "DistributedCGE":
        self.client.register_plugin(ForwardWorker(self._name, self.problem))
        self.client.subscribe_topic("all", self._report)
        return self

    def __exit__(self, *_: object) -> None:
        self._ranges = None
        if self.client.status == "running":
            self.client.unsubscribe_topic("all")
            self.client.unregister_worker_plugin(self._name)

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return queries(count(resolve(module, coordinates)), self.problem.difference)

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        """As `deepzero_core.cge`.

        Raises:
            LostError: no worker answered within the time-out, the scheduler was lost, or a range kills its workers.
        """
        parameters, buffers = state_of(module)
        seed = torch.initial_seed()
        state = StepState(uuid4().hex, batch.epoch, batch.index, _arrays(parameters), _arrays(buffers), seed)
        if self._evaluator is None:
            self._evaluator = prepare(module, batch.inputs, batch.targets, F.cross_entropy)
        evaluator, chosen = self._evaluator, resolve(module, coordinates)
        if self._ranges is None or self._ranges[0] is not coordinates:
            base = evaluator.base(parameters, buffers, batch.inputs, batch.targets)
            self._ranges = coordinates, *self._cut(evaluator, chosen, base)
        _, ranges, held_ranges, done = self._ranges
        held = self.client.submit(_hold, state, key=self._key("theta", state.name), pure=False)
        # In the order in which they are to begin, large ranges first.
        numbers = range(len(ranges))
        futures = [
            self.client.submit(_evaluate_base, self._name, held, key=self._key("base", state.name), pure=False),
            *self.client.map(
                _evaluate,
                numbers,
                plugin=self._name,
                state=held,
                ranges=held_ranges,
                key=[self._key("range", state.name, number) for number in numbers],
                pure=False,
            ),
        ]
        unperturbed, *results = self._results(futures)
        gradients = scatter(parameters, chosen, _joined(ranges, results))
        spent = queries(count(chosen), self.problem.difference)
        outputs, left = torch.from_numpy(unperturbed.outputs), _tensors(unperturbed.buffers)
        return GradientEstimate(gradients, spent, unperturbed.loss.item(), outputs, left, done)

    def _cut(
        self, evaluator: Evaluator, chosen: Mapping[str, Tensor], base: BasePass
    ) -> tuple[list[Range], Future, Cost]:
        """Ranges for a mask, large ones first; the workers hold them. And the cost of all."""
        memory = self.problem.memory
        parts = [(chunk.name, chunk.indices.numpy()) for chunk in chunks(evaluator, base, chosen, memory)]
        each = {name: total(evaluator.cost(base, name)).seconds(NOMINAL) for name in chosen}
        costs = [len(indices) * each[name] for name, indices in parts]
        groups = tapered(costs, RANGES)
        ranges = [Range(tuple(parts[i] for i in group)) for group in groups]
        held = self.client.submit(_hold, ranges, key=self._key("coordinates", uuid4().hex), pure=False)
        return ranges, held, work(evaluator, base, chosen, self.problem.difference)

    def _results(self, futures: Sequence[Future]) -> list[Any]:
        try:
            self._wait(futures)
            results: list[Any] = self.client.gather(list(futures))
            return results
        except BaseException as error:
            if self.client.status == "running":
                self.client.cancel(list(futures))  # nobody waits for them any more
            if isinstance(error, KilledWorker):
                raise LostError(
                    f"a coordinate range was tried on {error.allowed_failures + 1} Dask workers and each of them died; "
                    "see to their memory, or take a smaller estimator.memory_mib"
                ) from error
            if isinstance(error, CancelledError | OSError):
                address = self.client.scheduler.address
                raise LostError(f"the Dask scheduler at {address} was lost in the middle of a step") from error
            raise

    def _wait(self, futures: Sequence[Future]) -> None:
        """Wait as long as ranges keep coming back; the time-out starts again with each of them.

        A machine that was asleep has not waited: of a look that took longer than it may, only its own time counts.
        """
        look_s = min(5.0, self.timeout_s / 4)
        finished, waited, looked = 0, 0.0, time.monotonic()
        while True:
            try:
                wait_for(futures, timeout=look_s)
                return
            except TimeoutError:
                if self.client.status != "running":
                    raise ConnectionError(f"the Dask client is {self.client.status}") from None
                waited += min(time.monotonic() - looked, 2 * look_s)
                looked = time.monotonic()
                done = sum(future.done() for future in futures)
                if done > finished:
                    finished, waited = done, 0.0
                if waited > self.timeout_s:
                    workers = len(self.client.scheduler_info(n_workers=-1)["workers"])
                    raise LostError(
                        f"no answer from the {workers} Dask workers for {self.timeout_s:g} s "
                        f"({finished} of {len(futures)} tasks of this step are done)"
                    ) from None

    def _report(self, event: tuple[float, Any]) -> None:
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            log.warning("Dask worker %s was lost: its coordinate ranges are evaluated again", message.get("worker"))
        if isinstance(message, dict) and message.get("action") == "add-worker":
            log.info("Dask worker %s joined", message.get("worker"))

    def _key(self, kind: str, *parts: object) -> str:
        """Kind first: by it Dask knows ranges for a group of their own, and keeps them in one queue for all workers."""
        return "-".join(["deepzero", kind, self._name, *(str(part) for part in parts)])


def _joined(ranges: Sequence[Range], results: Sequence[list[np.ndarray]]) -> dict[str, Tensor]:
    """By parameter, what the ranges found, in the order of its coordinates."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for part, values in zip(ranges, results, strict=True):
        for (name, indices), value in zip(part.chunks, values, strict=True):
            found.setdefault(name, []).append((int(indices[0]), value))
    ordered = {name: sorted(parts, key=lambda part: part[0]) for name, parts in found.items()}
    return {name: torch.from_numpy(np.concatenate([v for _, v in parts])) for name, parts in ordered.items()}


def tapered(costs: Sequence[float], groups: int) -> list[list[int]]:
    """Split positions into at most `groups` consecutive runs, each of a smaller share of the cost than the one before.

    Shares fall linearly, (1 − (1 − k/groups)²) of the total in the first k: taken from one queue, the last ones are
    small enough for all workers to end together, and the first ones leave few tasks to be sent.
    """
    total, spent, runs = sum(costs), 0.0, []
    current: list[int] = []
    for position, cost in enumerate(costs):
        current.append(position)
        spent += cost
        share = 1 - (1 - (len(runs) + 1) / groups) ** 2
        if len(runs) + 1 < groups and spent >= total * share - 1e-12 * total:
            runs.append(current)
            current = []
    return [*runs, current] if current else runs
