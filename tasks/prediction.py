"""What the steps of a training run will take by the cost model, and what share of the machine's peak they reach.

    predicted seconds = seconds of the operations and bytes at one worker's peaks, and of starting operators / workers
    share of peak     = operations / (measured seconds · peak operations per second · workers)

Counted are the perturbations of coordinate-wise estimation, beside which a step's base pass is small.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import Experiment
from deepzero_core.data import BatchSource
from deepzero_core.estimators.cge import work
from deepzero_core.perturb import Evaluator, prepare
from deepzero_core.perturb.coordinates import resolve
from deepzero_core.perturb.cost import Cost
from deepzero_core.perturb.machine import Machine, measured
from deepzero_core.perturb.objective import preserved_random_state, state_of
from deepzero_core.training.sources import Coordinates
from infra.specs import elsewhere


@dataclass(frozen=True)
class Yardstick:
    """What is computed on: `workers` times one process at the peaks of this machine."""

    machine: Machine
    workers: int

    @classmethod
    def of(cls, experiment: Experiment) -> Self:
        """Workers on other machines are taken to be as fast as this one; here no more count than there are cores."""
        cluster = experiment.cluster
        if elsewhere(cluster):
            return cls(_measured(1), max(1, cluster.workers))
        if cluster.workers:
            return cls(_measured(1), min(cluster.workers, os.cpu_count() or 1))
        return cls(_measured(experiment.training.threads), 1)

    def seconds(self, cost: Cost) -> float:
        """The predicted time."""
        return cost.seconds(self.machine) / self.workers

    def fields(self, cost: Cost, seconds: float) -> dict[str, Any]:
        """Of a step that took `seconds`: what a history says of it; nothing where the cost model has no say."""
        if not cost.flops:
            return {}
        return {
            "step_seconds": seconds,
            "predicted_seconds": self.seconds(cost),
            "share_of_peak": cost.flops / (seconds * self.machine.flops * self.workers),
        }


Prepare = Callable[[nn.Module, Tensor, Tensor], Evaluator]
_PREPARE: Prepare = partial(prepare, loss_fn=F.cross_entropy)


def work_of_a_step(
    experiment: Experiment,
    module: nn.Module,
    batches: BatchSource,
    coordinates: Coordinates | None,
    prepared: Prepare = _PREPARE,
) -> Cost:
    """What one step's coordinate-wise estimate costs; the module stays as it is.

    prepared: gives the evaluator of (module, inputs, targets): that of the training, where there is one.
    """
    estimator = experiment.estimator
    inputs, targets = batches.batch(0, 0)
    modes = {part: part.training for part in module.modules()}
    module.train()
    try:
        with preserved_random_state():
            evaluator = prepared(module, inputs, targets)
            base = evaluator.base(*state_of(module), inputs, targets)
            chosen = resolve(module, coordinates)
            return work(evaluator, base, chosen, estimator.difference, estimator.memory_mib << 20)
    finally:
        for part, training in modes.items():
            part.training = training


def _measured(threads: int) -> Machine:
    with _threads(threads):
        return measured()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
