"""Forward evaluation on Dask workers: what a worker holds, what a task does, and the coordinator's side of a step.

    step        a small θ goes with every range; a large one is held by a task for the step, and every worker fetches it
                once, as a dependency of its ranges
    range       a fixed list of chunks; its result is loss differences, and of the first range also the unperturbed
                loss, outputs and buffers, which its worker has made for it anyway
    worker      keeps module, data and traced engine, built by a plugin that runs again on every replacement
    lane        workers of this machine are asked without the scheduler in between (`lanes`), others get tasks

Chunks follow from the coordinates and the memory budget, never from the number of workers, and every worker computes
on one thread: one worker, many workers, or a worker lost on the way give the same bits. What a lost worker held is
computed again from the task graph, θ included; what a slow one keeps others waiting for is asked again (`stragglers`).
Workers that share no disk with this process are sent the training images (`shipping`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED
from concurrent.futures import wait as wait_for_answers
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from distributed import CancelledError, Client, Future, KilledWorker
from distributed import wait as wait_for_tasks
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import GradientEstimate
from deepzero_core.errors import LostError
from deepzero_core.estimators.cge import queries, work
from deepzero_core.perturb import BasePass, Evaluator, prepare
from deepzero_core.perturb.coordinates import count, resolve, scatter
from deepzero_core.perturb.cost import Cost, total
from deepzero_core.perturb.evaluator import chunks
from deepzero_core.perturb.machine import NOMINAL
from deepzero_core.perturb.objective import state_of
from deepzero_core.training import Batch
from deepzero_core.training.sources import Coordinates
from infra.cluster import shares_disk
from infra.forward_worker import Answer, ForwardWorker, StepState, evaluate, tensors_of
from infra.lanes import Asked, LaneLostError, Lanes
from infra.packed import packed, unpacked
from infra.plugins import name_for, present, withdraw
from infra.problem import Images, Problem
from infra.ranges import Range, copies_for, divided, grouped, joined, paces
from infra.shipping import Shipment
from infra.stragglers import Answers, Task

log = logging.getLogger(__name__)

_SPREAD_S = 10.0
_SENT_S = 0.02
_TIMED_STEPS = 2
_ALONG = 4 << 20
"""Bytes of θ, in all its copies, that ranges take along: more of them are fetched, once by each worker."""


def _hold(value: Any) -> Any:
    """A task whose only purpose is that its result is cached on workers and rebuilt from the graph when lost."""
    return value


def _seen(value: Any) -> None:
    """A task whose only purpose is that its worker has its argument."""


def _nominal(evaluator: Evaluator, base: BasePass, name: str, coordinates: int) -> float:
    """Seconds of a chunk by the cost model."""
    starts = Cost(starts=evaluator.starts(base, name, 1))
    return (total(evaluator.cost(base, name)) * coordinates + starts).seconds(NOMINAL)


@dataclass(frozen=True)
class _Cut:
    """The chunks of a mask and what they cost by the model; their ranges, and these as they are sent.

    workers, timed: for so many, after so many steps whose chunks were timed.
    """

    coordinates: Coordinates | None
    parts: list[tuple[str, np.ndarray]]
    nominal: list[float]
    workers: int
    timed: int
    ranges: list[Range]
    packed: list[bytes]
    costs: list[float]
    work: Cost

    def pieces(self, number: int, count: int) -> list[bytes]:
        """A range in at most so many pieces, as they are sent."""
        found = divided(self.ranges[number], count)
        return [packed((part, number + place == 0)) for place, part in enumerate(found)]

    def evaluated(self, chosen: Sequence[Sequence[Any]]) -> list[Range]:
        """What answers were given to, ranges or pieces of them, in order; chosen: those of each range."""
        return [
            part for whole, answers in zip(self.ranges, chosen, strict=True) for part in divided(whole, len(answers))
        ]


@dataclass
class DistributedCGE:
    """Coordinate-wise estimation over Dask workers; a `GradientSource`. Use as a context manager."""

    client: Client
    problem: Problem
    timeout_s: float = 60.0
    lanes: bool = True
    """Whether workers of this machine are asked through lanes: not where they stand for those of others."""
    asked_again: int = 0
    """Tasks so far that were asked of a second worker because the first was late."""
    _name: str = field(default_factory=lambda: uuid4().hex)
    _plugin: str = ""
    _evaluator: Evaluator | None = None
    _cut: _Cut | None = None
    _pace: dict[str, float] = field(default_factory=dict)
    _timed: int = 0
    _workers: set[str] = field(default_factory=set)
    _lanes: Lanes | None = None
    _shipment: Shipment | None = None
    _mark: Future | None = None
    """A task of the scheduler: cancelled when that is lost, whether or not another one has taken its place."""

    def __enter__(self) -> "DistributedCGE":
        images = None
        if not shares_disk(self.client):
            self._shipment = Shipment(self.client)
            images = Images.of(self.problem, self._shipment)
        if self.lanes:
            self._lanes = Lanes()
        self._plugin = name_for(self.client, "forward")
        doors = self._lanes and str(self._lanes.folder)
        self.client.register_plugin(ForwardWorker(self._plugin, self.problem, doors, images))
        self._mark = self.client.submit(_hold, None, key=self._key("mark"), pure=False)
        self.client.subscribe_topic("all", self._report)
        # Not `scheduler_info`: the client renews that every two seconds, without workers.
        self._workers |= set(self.client.nthreads())
        return self

    def __exit__(self, *_: object) -> None:
        self._cut = self._shipment = self._mark = None
        withdraw(self.client, self._plugin, topic="all")
        if self._lanes is not None:
            self._lanes.close()

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return queries(count(resolve(module, coordinates)), self.problem.difference)

    def prepared(self, module: nn.Module, inputs: Tensor, targets: Tensor) -> Evaluator:
        """As `CGESource.prepared`."""
        if self._evaluator is None:
            self._evaluator = prepare(module, inputs, targets, F.cross_entropy)
        return self._evaluator

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        """As `deepzero_core.cge`.

        Raises:
            LostError: no worker answered within the time-out, the scheduler was lost, or a range kills its workers.
        """
        parameters, buffers = state_of(module)
        state = StepState.of(batch, parameters, buffers, torch.initial_seed())
        if self._evaluator is None:
            self.prepared(module, batch.inputs, batch.targets)
        chosen = resolve(module, coordinates)
        cut = self._cut_for(coordinates, chosen, lambda e: e.base(parameters, buffers, batch.inputs, batch.targets))
        asked = self._lanes and self._asked(self._lanes, state, cut, lambda: batch.targets)
        parts, answers = asked or self._answers(state, cut)
        self._time(parts, answers)
        gradients = scatter(parameters, chosen, joined(parts, [answer.slopes for answer in answers]))
        spent = queries(count(chosen), self.problem.difference)
        unperturbed = answers[0].unperturbed
        assert unperturbed is not None
        outputs, left = torch.from_numpy(unperturbed.outputs), tensors_of(unperturbed.buffers)
        return GradientEstimate(gradients, spent, unperturbed.loss.item(), outputs, left, cut.work)

    def _cut_for(
        self, coordinates: Coordinates | None, chosen: Mapping[str, Tensor], base_of: Callable[[Evaluator], BasePass]
    ) -> _Cut:
        """Ranges for a mask and the workers there are, cut when one of them has changed or a first step was timed."""
        cut, evaluator, workers, timed = self._cut, self._evaluator, len(self._workers), self._timed
        assert evaluator is not None
        if cut is None or cut.coordinates is not coordinates:
            base = base_of(evaluator)
            parts = [(c.name, c.indices.numpy()) for c in chunks(evaluator, base, chosen, self.problem.memory)]
            nominal = [_nominal(evaluator, base, name, len(indices)) for name, indices in parts]
            done = work(evaluator, base, chosen, self.problem.difference, self.problem.memory)
        elif (cut.workers, cut.timed) != (workers, timed):
            parts, nominal, done = cut.parts, cut.nominal, cut.work
        else:
            return cut
        costs = [
            len(indices) * self._pace[name] if name in self._pace else cost
            for (name, indices), cost in zip(parts, nominal, strict=True)
        ]
        groups = grouped(costs, workers) or [[]]  # without a coordinate there is still the base pass
        ranges = [Range(tuple(parts[i] for i in group)) for group in groups]
        sent = [packed((part, number == 0)) for number, part in enumerate(ranges)]
        shares = [sum(costs[i] for i in group) for group in groups]
        self._cut = _Cut(coordinates, parts, nominal, workers, timed, ranges, sent, shares, done)
        return self._cut

    def _time(self, parts: Sequence[Range], answers: Sequence[Answer]) -> None:
        """Note what coordinates take. The first step's times are high: its workers make what the others find."""
        if self._timed < _TIMED_STEPS:
            self._timed += 1
            for name, seconds in paces(parts, [answer.seconds for answer in answers]).items():
                self._pace[name] = min(self._pace.get(name, seconds), seconds)

    def _asked(
        self, lanes: Lanes, state: StepState, cut: _Cut, meanwhile: Callable[[], object]
    ) -> tuple[list[Range], list[Answer]] | None:
        """As `_answers`, through lanes; None where there is none to some worker, or the last has ended."""
        if not lanes.lead_to(self._workers):
            return None
        step = state.name, packed(state)
        questions = [Asked(step, part) for part in cut.packed]

        def again(number: int, pieces: int, workers: Sequence[str]) -> list[Asked]:
            parts = [Asked(step, part) for part in cut.pieces(number, pieces)]
            lanes.ask(parts)
            return parts

        tasks = [Task(c, q, partial(again, n)) for n, (c, q) in enumerate(zip(cut.costs, questions, strict=True))]
        answers = Answers(lanes, tasks, lambda: len(self._workers), lambda: self.timeout_s)
        try:
            lanes.ask(questions)
            wait_for_answers(questions, timeout=_SENT_S, return_when=FIRST_COMPLETED)
            meanwhile()  # which would hold up the questions while they leave
            answers.wait()
            chosen = [answers.chosen[number] for number in range(len(tasks))]
            return cut.evaluated(chosen), [unpacked(asked.result()) for futures in chosen for asked in futures]
        except (LaneLostError, ConnectionError):
            return None
        finally:
            self.asked_again += answers.asked_again
            lanes.take_back([asked for asked in answers.futures() if not asked.done()])

    def _tasks(self, state: StepState, cut: _Cut) -> list[Task]:
        """The ranges, in the order in which they are to begin, large ones first."""
        numbers = range(len(cut.ranges))
        held: Future | StepState = state
        if len(state.theta) * len(numbers) > _ALONG:
            held = self.client.submit(_hold, state, key=self._key("theta", state.name), pure=False)
            copies = copies_for(min(len(self._workers), len(cut.ranges)), len(state.theta))
            if copies > 1:
                self._spread(held, copies)
        futures = self.client.map(
            evaluate,
            cut.packed,
            [held] * len(numbers),
            plugin=self._plugin,
            key=[self._key("range", state.name, number) for number in numbers],
            pure=False,
        )

        def again(number: int, pieces: int, workers: Sequence[str]) -> list[Future]:
            parts = cut.pieces(number, pieces)
            keys = [self._key("again", state.name, number, uuid4().hex) for _ in parts]
            options = {"key": keys, "pure": False, "workers": list(workers)}
            return self.client.map(evaluate, parts, [held] * len(parts), plugin=self._plugin, **options)

        return [Task(cost, f, partial(again, n)) for n, cost, f in zip(numbers, cut.costs, futures, strict=True)]

    def _spread(self, held: Future, copies: int) -> None:
        """Have some workers fetch θ first, so that the others need not all fetch it from one.

        `Client.replicate` does so as well, but tells of it in an event that no subscriber can be sent.
        """
        key = self._key("copy", uuid4().hex)
        seen = [
            self.client.submit(_seen, held, workers=[worker], key=f"{key}-{number}", pure=False)
            for number, worker in enumerate(sorted(self._workers)[:copies])
        ]
        with suppress(TimeoutError):  # the step itself will tell who does not answer
            wait_for_tasks(seen, timeout=min(_SPREAD_S, self.timeout_s))

    def _answers(self, state: StepState, cut: _Cut) -> tuple[list[Range], list[Answer]]:
        """What was evaluated, ranges or pieces of them, in order; and the answers."""
        if self._mark is None or self._mark.cancelled():
            raise self._scheduler_lost()
        tasks = self._tasks(state, cut)
        answers = Answers(self.client, tasks, lambda: len(self._workers), lambda: self.timeout_s)
        try:
            answers.wait()
            self.asked_again += answers.asked_again
            chosen = [answers.chosen[number] for number in range(len(tasks))]
            results = self.client.gather([future for futures in chosen for future in futures])
            return cut.evaluated(chosen), [unpacked(present(result)) for result in results]
        except KilledWorker as error:
            raise LostError(
                f"a coordinate range was tried on {error.allowed_failures + 1} Dask workers and each of them died; "
                "see to their memory, or take a smaller estimator.memory_mib"
            ) from error
        except (CancelledError, OSError) as error:
            raise self._scheduler_lost() from error
        finally:
            open_still = [future for future in answers.futures() if not future.done()]
            if open_still and self.client.status == "running":
                self.client.cancel(open_still)  # nobody waits for them any more

    def _scheduler_lost(self) -> LostError:
        return LostError(f"the Dask scheduler at {self.client.scheduler.address} was lost in the middle of a step")

    def _report(self, event: tuple[float, Any]) -> None:
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            self._workers.discard(str(message.get("worker")))
            log.warning("Dask worker %s was lost: its coordinate ranges are evaluated again", message.get("worker"))
        if isinstance(message, dict) and message.get("action") == "add-worker":
            self._workers.add(str(message.get("worker")))
            log.info("Dask worker %s joined", message.get("worker"))

    def _key(self, kind: str, *parts: object) -> str:
        """Kind first: by it Dask knows ranges for a group of their own, and keeps them in one queue for all workers."""
        return "-".join(["deepzero", kind, self._name, *(str(part) for part in parts)])
