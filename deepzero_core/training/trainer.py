"""The training loop as a generator of records.

Every random number is a function of (seed, epoch, step), so that the counters are the generators' state: a trainer
restored from a checkpoint goes on with the same bits. The trainer logs nothing and writes nothing; whoever iterates it
decides what becomes of the records and when to save `state()`.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepzero_core.errors import RequestError, WorkError, suggest
from deepzero_core.perturb.cost import Cost
from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.sparsity import draw_masks
from deepzero_core.training.schedule import Schedule
from deepzero_core.training.sources import Batch, Coordinates, GradientSource, step_generator

_DROPOUT, _MASKS = range(2)


class Batches(Protocol):
    """A source of training batches that is a pure function of (epoch, index)."""

    @property
    def steps_per_epoch(self) -> int: ...

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TrainingSettings:
    """What a training run consists of.

    ratios:           layer-wise pruning ratios; None: every coordinate, every step.
    redraw_epochs:    a new mask is drawn every so many epochs.
    weight_masks:     fixed masks on the weights themselves (the sparse-weight baseline), True = keep; None: dense.
    query_budget:     the run ends before a step that would exceed it; None: no limit.
    """

    steps: int
    schedule: Schedule
    seed: int
    optimizer: str = "SGD"
    optimizer_arguments: Mapping[str, Any] | None = None
    ratios: Mapping[str, float] | None = None
    redraw_epochs: int = 1
    weight_masks: Mapping[str, Tensor] | None = None
    query_budget: int | None = None


@dataclass(frozen=True)
class StepRecord:
    """One step: `step` counts from 1; loss and accuracy are the batch's, before the update; queries are cumulative.

    accuracy: the share of targets that the outputs name; None where outputs are not scores [B, K] of classes.
    """

    step: int
    epoch: int
    loss: float
    accuracy: float | None
    learning_rate: float
    queries: int
    epoch_ends: bool
    work: Cost = field(default_factory=Cost)
    """Of the step's perturbations, by the cost model."""


class NonFiniteError(WorkError):
    """The loss or the gradient is no longer a finite number."""


class Trainer:
    """Trains a module in place with the gradients of a source."""

    def __init__(self, module: nn.Module, batches: Batches, source: GradientSource, settings: TrainingSettings) -> None:
        self.module = module
        self.settings = settings
        self.step = 0
        self.queries = 0
        self._batches = batches
        self._source = source
        self._optimizer = build_optimizer(
            module, settings.optimizer, settings.schedule.peak, settings.optimizer_arguments or {}
        )
        self._masks: tuple[int, dict[str, Tensor]] | None = None
        self._keep_masked_weights_at_zero()

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0."""
        return self.step // self._batches.steps_per_epoch

    @property
    def budget_left(self) -> bool:
        """Whether the next step can be paid for."""
        budget = self.settings.query_budget
        return budget is None or self.queries + self._source.cost(self.module, self.coordinates()) <= budget

    def coordinates(self) -> Coordinates | None:
        """Masks of the next step's epoch, True = estimate: a function of (ratios, seed, epoch). None: all."""
        settings = self.settings
        if settings.ratios is None:
            return None
        drawn = self.epoch // settings.redraw_epochs
        if self._masks is None or self._masks[0] != drawn:
            generator = step_generator(settings.seed, _MASKS, drawn)
            self._masks = drawn, draw_masks(dict(settings.ratios), self.module, generator)
        return self._masks[1]

    def run(self) -> Iterator[StepRecord]:
        """Train to the last step or to the end of the query budget, one record per step.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; the parameters are still those before the step.
        """
        while self.step < self.settings.steps and self.budget_left:
            yield self._advance()

    def _advance(self) -> StepRecord:
        per_epoch = self._batches.steps_per_epoch
        epoch, index = divmod(self.step, per_epoch)
        batch = Batch(self.step, epoch, index, partial(self._batches.batch, epoch, index))
        self.module.train()
        with torch.random.fork_rng():
            torch.manual_seed(step_generator(self.settings.seed, _DROPOUT, self.step).initial_seed())
            estimate = self._source.estimate(self.module, batch, self.coordinates())
        learning_rate = self.settings.schedule.at(self.step)
        self._check_finite(estimate, learning_rate)
        # The counters go first: whoever interrupts the update can tell from them that a step is half done.
        self.step += 1
        self.queries += estimate.queries
        self._update(estimate, learning_rate)
        return StepRecord(
            step=self.step,
            epoch=epoch,
            loss=estimate.loss,
            accuracy=_accuracy(estimate.outputs, batch.targets),
            learning_rate=learning_rate,
            queries=self.queries,
            epoch_ends=index == per_epoch - 1,
            work=estimate.work,
        )

    def _check_finite(self, estimate: GradientEstimate, learning_rate: float) -> None:
        broken = [name for name, gradient in estimate.gradients.items() if not gradient.isfinite().all()]
        if math.isfinite(estimate.loss) and not broken:
            return
        lost = not math.isfinite(estimate.loss)
        what = f"the loss is {estimate.loss}" if lost else f"the gradient of {broken[0]!r} is not finite"
        raise NonFiniteError(
            f"step {self.step + 1}: {what} (learning rate {learning_rate:.4g}); "
            "try a smaller training.optimizer.lr, a longer training.schedule.warmup_epochs or another estimator.mu"
        )

    def _update(self, estimate: GradientEstimate, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self.module.named_parameters():
            parameter.grad = estimate.gradients[name] if parameter.requires_grad else None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(estimate.buffers[name])
        self._keep_masked_weights_at_zero()

    def _keep_masked_weights_at_zero(self) -> None:
        if self.settings.weight_masks is not None:
            with torch.no_grad():
                for name, parameter in self.module.named_parameters():
                    if name in self.settings.weight_masks:
                        parameter.mul_(self.settings.weight_masks[name])

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "step": self.step,
            "queries": self.queries,
            "seed": self.settings.seed,
            "module": self.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "masks": dict(self.coordinates() or {}),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of a trainer with the same settings.

        Raises:
            RequestError: the state is of another network or another seed, or no state of a trainer at all.
        """
        check_state(state)
        if state["seed"] != self.settings.seed:
            raise RequestError(f"the checkpoint is of seed {state['seed']}, this run of seed {self.settings.seed}")
        try:
            self.module.load_state_dict(state["module"])
            self._optimizer.load_state_dict(state["optimizer"])
        # torch says it in as many ways as there are things that do not fit.
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"the checkpoint is of another network: {reason}") from error
        self.step, self.queries = state["step"], state["queries"]
        self._masks = None
        drawn, kept = self.coordinates() or {}, state["masks"]
        if drawn.keys() != kept.keys() or any(not _equal(mask, drawn[name]) for name, mask in kept.items()):
            raise RequestError("the checkpoint was written with other layer-wise pruning ratios")


def check_state(state: Mapping[str, Any]) -> None:
    """Refuse what no trainer has written, by types alone.

    Raises:
        RequestError: says which entry is wrong.
    """
    expected = {"step": int, "queries": int, "seed": int, "module": dict, "optimizer": dict, "masks": dict}
    for name, kind in expected.items():
        if not isinstance(state, Mapping) or not isinstance(state.get(name), kind):
            raise RequestError(f"the checkpoint has no {name!r} as a trainer writes it ({kind.__name__})")
    if state["step"] < 0 or state["queries"] < 0:
        raise RequestError("the checkpoint counts steps or queries below zero")


def _equal(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and torch.equal(found, expected)


def _accuracy(outputs: Any, targets: Tensor) -> float | None:
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
        return None
    return (outputs.argmax(1) == targets).float().mean().item()


def build_optimizer(
    module: nn.Module, name: str, learning_rate: float, arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Any optimiser of `torch.optim` by name, over the trainable parameters.

    Raises:
        RequestError: no such optimiser, or arguments that it does not take.
    """
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name not in known:
        raise RequestError(f"unknown optimizer {name!r}: {suggest(name, known)}")
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        built: torch.optim.Optimizer = known[name](trainable, **{"lr": learning_rate, **arguments})
    except (TypeError, ValueError) as error:
        raise RequestError(f"optimizer {name} does not take these arguments: {error}") from error
    return built
