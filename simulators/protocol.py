"""What a simulator is: many simulations in, the same simulations one step later out.

    state    named fields, {name: [N, …]}; N simulations, each for itself
    params   what a step needs besides, {name: [N, …]}: Reynolds numbers, forces
    step     (state, params) → state; nothing is changed in place, and no simulation knows of the others

A simulation that diverges or whose program crashes has an outcome, never an exception: its fields come back as NaN and
stay NaN, and `Statistics` counts it once. Whoever trains on it decides what it costs (`simulators.methods`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from deepzero_core.errors import RequestError, suggest

State = dict[str, Tensor]
Fields = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Statistics:
    """What a simulator has done so far.

    steps: simulation-steps, N of a step of N simulations that were alive. seconds: the time they took.
    diverged: simulations whose fields left the finite or the plausible. crashed: simulations lost with their program.
    restarts: programs started again. last_error: the newest reason for a crash, one line.
    """

    steps: int = 0
    diverged: int = 0
    crashed: int = 0
    restarts: int = 0
    seconds: float = 0.0
    last_error: str = ""

    def __add__(self, other: "Statistics") -> "Statistics":
        names = [field.name for field in fields(self) if field.name != "last_error"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Statistics(**sums, last_error=other.last_error or self.last_error)

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.seconds else 0.0


class Simulator(Protocol):
    """One step of many simulations.

    state_shapes, param_shapes: of one simulation, without N, by name. A state may lack fields in `optional`; these are
    advanced where they are present.
    differentiable: torch can take the derivative of `step`.
    """

    @property
    def state_shapes(self) -> Shapes: ...

    @property
    def param_shapes(self) -> Shapes: ...

    @property
    def optional(self) -> frozenset[str]: ...

    @property
    def differentiable(self) -> bool: ...

    @property
    def statistics(self) -> Statistics: ...

    def step(self, state: Fields, params: Fields) -> State:
        """The state one step later, in the type and on the device that it came in.

        Raises:
            RequestError: a field is missing, unknown or of another shape.
        """
        ...


def alive(state: Fields) -> Tensor:
    """Which simulations are: bool [N], true where every number of every field is finite."""
    each = [value.flatten(1).isfinite().all(1) for value in state.values()]
    return torch.stack(each).all(0)


def count(state: Fields) -> int:
    """N, the number of simulations in a state."""
    return len(next(iter(state.values())))


def check(what: str, found: Fields, shapes: Shapes, optional: frozenset[str] = frozenset()) -> None:
    """Refuse fields that are not those of `shapes`, each [N, …] with one and the same N.

    Raises:
        RequestError: says which field, what it is and what it should be.
    """
    for name in found:
        if name not in shapes:
            raise RequestError(f"{what} has a field {name!r} that the simulator does not know: {suggest(name, shapes)}")
    for name, shape in shapes.items():
        if name not in found:
            if name in optional:
                continue
            raise RequestError(f"{what} lacks the field {name!r}, of shape [N, {', '.join(map(str, shape))}]")
        if tuple(found[name].shape[1:]) != shape or found[name].ndim == 0:
            raise RequestError(
                f"the field {name!r} of {what} has the shape {list(found[name].shape)}; "
                f"it must be [{', '.join(['N', *map(str, shape)])}]"
            )
    if len({len(value) for value in found.values()}) > 1:
        lengths = ", ".join(f"{name}: {len(value)}" for name, value in found.items())
        raise RequestError(f"the fields of {what} are for different numbers of simulations ({lengths})")
