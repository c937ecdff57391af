"""What all simulators share: arguments are checked, the dead are left alone, those that die are marked and counted."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from deepzero_core.errors import RequestError
from simulators.protocol import Fields, Shapes, State, Statistics, alive, check, count

RANGES = 24
"""The most questions of a step: enough for a dozen processes to end together."""
_LEAST = 2


@dataclass(frozen=True)
class Crash:
    """What `advance` returns in place of a state when the simulations were lost with their program."""

    reason: str


class Contained(ABC):
    """A simulator of which only `advance` is missing.

    limit: the largest plausible absolute value of a field; a simulation beyond it has diverged.
    batch_size: the most simulations that are advanced together; the crash of a program takes no more with it. None:
        as many as make at most `RANGES` questions of a step, two or more. How a step is cut depends on nothing else,
        and never on who answers.
    Fit for pickling: a copy counts anew.
    """

    optional: frozenset[str] = frozenset()
    differentiable: bool = False

    def __init__(self, *, limit: float, batch_size: int | None) -> None:
        if not limit > 0:
            raise RequestError(f"limit, the largest plausible value of a field, must be positive, not {limit}")
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"batch_size, the most simulations of one call, must be at least 1, not {batch_size}")
        self.limit, self.batch_size = limit, batch_size
        self._begin()

    def _begin(self) -> None:
        self.statistics = Statistics()
        self._lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("statistics", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    @abstractmethod
    def state_shapes(self) -> Shapes: ...

    @property
    @abstractmethod
    def param_shapes(self) -> Shapes: ...

    @abstractmethod
    def advance(self, state: State, params: State) -> State | Crash:
        """One step of at most `batch_size` simulations, all of them alive, on the CPU."""

    def advance_all(self, pieces: Sequence[tuple[State, State]]) -> list[State | Crash]:
        """What `advance` makes of each (state, parameters), in order."""
        return [self.advance(*piece) for piece in pieces]

    def close(self) -> None:  # noqa: B027 — most hold nothing open
        """Let go of what is held open; a later step opens it again."""

    def step(self, state: Fields, params: Fields) -> State:
        """One step; see `simulators.protocol`."""
        check("the state", state, self.state_shapes, self.optional)
        check("the parameters", params, self.param_shapes)
        lengths = {count(some) for some in (state, params) if some}
        if len(lengths) > 1:
            raise RequestError(f"the state is of {count(state)} simulations, the parameters of {count(params)}")
        living = alive(state)
        began = time.perf_counter()
        if bool(living.all()):
            after = self._in_pieces(dict(state), dict(params))
        else:
            chosen = living.nonzero()[:, 0]
            some = self._in_pieces(_at(state, chosen), _at(params, chosen)) if len(chosen) else {}
            after = {name: torch.full_like(value, torch.nan) for name, value in state.items()}
            after = {name: value.index_copy(0, chosen, some[name]) if some else value for name, value in after.items()}
        self._count(Statistics(steps=int(living.sum()), seconds=time.perf_counter() - began))
        return after

    def _in_pieces(self, state: State, params: State) -> State:
        size = self.batch_size or max(_LEAST, -(-count(state) // RANGES))
        pieces = [
            (
                {name: value[start : start + size] for name, value in state.items()},
                {name: value[start : start + size] for name, value in params.items()},
            )
            for start in range(0, count(state), size)
        ]
        if not pieces:
            return {name: value.clone() for name, value in state.items()}
        with self._lock:
            found = self.advance_all([(_on_cpu(some), _on_cpu(given)) for some, given in pieces])
        after = [self._contained(some, answer) for (some, _), answer in zip(pieces, found, strict=True)]
        return {name: torch.cat([piece[name] for piece in after]) for name in state}

    def _contained(self, state: State, after: State | Crash) -> State:
        """What has become of one piece: NaN for the simulations that died in this step."""
        if isinstance(after, Crash):
            self._count(Statistics(crashed=count(state), last_error=after.reason))
            return {name: torch.full_like(value, torch.nan) for name, value in state.items()}
        after = {name: after[name].to(value) for name, value in state.items()}
        good = torch.stack([_largest(value) <= self.limit for value in after.values()]).all(0)
        lost = len(good) - int(good.sum())
        if lost:
            self._count(Statistics(diverged=lost))
            after = {name: torch.where(_like(good, value), value, torch.nan) for name, value in after.items()}
        return after

    def _count(self, more: Statistics) -> None:
        with self._lock:
            self.statistics = self.statistics + more


def _largest(value: Tensor) -> Tensor:
    """[N]: the largest absolute value; NaN where there is one, which no limit allows."""
    return value.detach().flatten(1).abs().amax(1)


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (value.ndim - 1))


def _at(values: Fields, chosen: Tensor) -> State:
    return {name: value[chosen] for name, value in values.items()}


def _on_cpu(values: State) -> State:
    return {name: value.cpu() for name, value in values.items()}
