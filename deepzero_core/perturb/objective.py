"""The loss as a pure function of the parameters, and the random state it is evaluated under.

Everything that estimates a gradient evaluates `objective`: the module's parameters and buffers are read, never written.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

LossFn = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """One forward pass: the mean loss, the module's outputs and its buffers as the pass leaves them."""

    loss: Tensor
    outputs: Any
    buffers: dict[str, Tensor]


def objective(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
) -> Evaluation:
    """Evaluate l(θ) = mean over the batch of loss_fn(module(inputs; θ), targets).

    Buffers are cloned first, so that BatchNorm's running statistics are returned instead of overwritten. So are the
    parameters and inputs: a module that clips its weights or shifts its inputs in place must not move the next query.
    `loss_fn` may return the mean as a scalar or one loss per example, [B].
    """
    fresh = {name: buffer.clone() for name, buffer in buffers.items()}
    own = {name: parameter.clone() for name, parameter in parameters.items()}
    state = {f"module.{name}": value for part in (own, fresh) for name, value in part.items()}
    outputs, loss = functional_call(_WithLoss(module, loss_fn), state, (inputs.clone(), targets))
    return Evaluation(loss.mean() if loss.ndim else loss, outputs, fresh)


class _WithLoss(nn.Module):
    """The module and its loss as one: a loss that calls the module again sees the same parameters."""

    def __init__(self, module: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.module, self.loss_fn = module, loss_fn

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Any, Tensor]:
        outputs = self.module(inputs)
        return outputs, self.loss_fn(outputs, targets)


def state_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The module's parameters and buffers by name, detached; shared ones once, under their first name."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return parameters, {name: b.detach() for name, b in module.named_buffers()}


@dataclass(frozen=True)
class RandomState:
    """A snapshot of torch's global generators, so that every query sees the same random numbers.

    Dropout draws from the global generators. A finite difference between two passes with different masks would measure
    the masks; with the same numbers replayed it measures the parameter (common random numbers).
    """

    cpu: Tensor = field(default_factory=torch.get_rng_state)
    cuda: list[Tensor] = field(
        default_factory=lambda: torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    )

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def preserved_random_state() -> Iterator[RandomState]:
    """Leave torch's global generators as they were found."""
    state = RandomState()
    try:
        yield state
    finally:
        state.restore()
