"""A step of coordinate-wise estimation on many workers, as a discrete-event simulation.

    coordinator   Dask's scheduler, one process that handles one thing at a time: it hands tasks out, first in, first
                  out, and takes answers; a worker has at most one task beside the one that it evaluates
    client        sends all tasks of a step before it waits, and gathers all answers at the end
    worker        fetches θ with its first task of a step, from a worker that has it, and makes the base pass
    θ             leaves a worker one copy after the other; the first copies are made before the tasks are sent

Times are seconds. Nothing is drawn at random: of two things at the same moment the one noted first comes first.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise

_AHEAD = 2


@dataclass(frozen=True)
class Costs:
    """What a cluster costs beside the work.

    step                 of a step with next to nothing to compute, whatever its tasks and workers
    client_task          of the client, for each task: sent, and its answer gathered
    coordinator_task     of the scheduler, for each task: handed out, taken back, forgotten
    coordinator_worker   of the scheduler, for each worker that takes part in a step
    round_trip           between scheduler and worker
    bandwidth            bytes per second from one worker to another
    """

    step: float
    client_task: float
    coordinator_task: float
    coordinator_worker: float
    round_trip: float
    bandwidth: float


@dataclass(frozen=True)
class Load:
    """What a step computes. tasks: seconds of each, in the order of the queue; base: seconds; theta: bytes."""

    tasks: tuple[float, ...]
    base: float
    theta: int


@dataclass(frozen=True)
class Step:
    """Seconds of a step; and what share of them the coordinator was busy, and the workers were on average."""

    seconds: float
    coordinator: float
    workers: float


class _Coordinator:
    """One thing after the other."""

    def __init__(self) -> None:
        self.free = self.busy = 0.0

    def handle(self, when: float, seconds: float) -> float:
        """When it is done with something that came in at `when`."""
        self.free = max(self.free, when) + seconds
        self.busy += seconds
        return self.free


class _Workers:
    """Equal workers. holders: when each of those that have θ is free to send it once more."""

    def __init__(self, number: int, copies: int, start: float, load: Load, transfer: float) -> None:
        self._base, self._transfer = load.base, transfer
        self._holders = [start] * copies
        self._has_theta = [worker < copies for worker in range(number)]
        self._free: list[float | None] = [None] * number
        self.busy = 0.0

    def evaluate(self, worker: int, when: float, seconds: float) -> float:
        """When the answer of a task is there that has come in at `when`."""
        if not self._has_theta[worker]:
            self._has_theta[worker] = True
            holder = min(range(len(self._holders)), key=self._holders.__getitem__)
            when = self._holders[holder] = max(when, self._holders[holder]) + self._transfer
        free = self._free[worker]
        seconds += self._base if free is None else 0.0
        self._free[worker] = ended = max(when, when if free is None else free) + seconds
        self.busy += seconds
        return ended


def simulate(load: Load, costs: Costs, workers: int, *, copies: int = 1) -> Step:
    """One step on so many workers."""
    half, transfer, tasks = costs.round_trip / 2, load.theta / costs.bandwidth, len(load.tasks)
    coordinator = _Coordinator()
    sent = costs.step + (copies - 1) * costs.client_task
    spread = coordinator.handle(sent, (copies - 1) * (costs.coordinator_task + costs.coordinator_worker))
    start = spread + (copies - 1) * transfer + (costs.round_trip if copies > 1 else 0.0)
    pool, serial, waiting = _Workers(workers, copies, start, load, transfer), count(), iter(load.tasks)
    answers: list[tuple[float, int, int]] = []

    def hand_out(worker: int, when: float, extra: float = 0.0) -> None:
        arrives = coordinator.handle(when, costs.coordinator_task / 2 + extra) + half
        heapq.heappush(answers, (pool.evaluate(worker, arrives, next(waiting)) + half, next(serial), worker))

    first = min(tasks, _AHEAD * workers)
    for number in range(first):
        news = costs.coordinator_worker if number < workers else 0.0
        hand_out(number % workers, start + (number + 1) * costs.client_task / 2, news)
    left = tasks - first
    while answers:
        when, _, worker = heapq.heappop(answers)
        coordinator.handle(when, costs.coordinator_task / 2)
        if left:
            left -= 1
            hand_out(worker, when)
    seconds = coordinator.free + tasks * costs.client_task / 2
    return Step(seconds, coordinator.busy / seconds, pool.busy / workers / seconds)


def saturation(steps: Sequence[tuple[int, float]], gain: float = 1.1) -> int:
    """The number of workers from which on twice as many make a step less than `gain` times as fast.

    steps: (workers, seconds), each of twice as many workers as the one before.
    """
    return next((workers for (workers, slow), (_, fast) in pairwise(steps) if slow < gain * fast), steps[-1][0])
