"""A simulator whose work is done by others: a step is cut into ranges, any of them advances one, answers come in order.

    question   (state, parameters), named arrays [n, …]: one range
    answer     the state one step later or its crash, and what the range has cost in restarts

Who answers is the caller's: `ask` takes all questions of a step. Ranges are those of the simulator itself
(`Contained`), so that it makes no difference to any bit, nor to who has crashed, by whom a range is advanced.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from simulators.contained import Contained, Crash
from simulators.own import own_simulator
from simulators.protocol import Shapes, State, Statistics

Arrays = dict[str, np.ndarray]
Question = tuple[Arrays, Arrays]
Answer = tuple[Arrays | Crash, Statistics]
Ask = Callable[[Sequence[Question]], Sequence[Answer]]


class Member:
    """What each of the others keeps: a simulator of its own, with a process of its own where it is a program.

    kind, settings: see `own_simulator`.
    """

    def __init__(self, kind: str, settings: Mapping[str, Any]) -> None:
        self._simulator = own_simulator(kind, settings)

    def __call__(self, question: Question) -> Answer:
        """Advance one range. RequestError: the program cannot be started, or the function answers another shape."""
        simulator = self._simulator
        simulator.statistics = Statistics()
        state, params = (_tensors(some) for some in question)
        with torch.no_grad():
            after = simulator.advance(state, params)
        return after if isinstance(after, Crash) else _arrays(after), simulator.statistics

    def close(self) -> None:
        """End the program."""
        self._simulator.close()


class SharedOut(Contained):
    """The same as `simulator`, which itself is never asked, by way of `ask`. Nothing can be differentiated."""

    def __init__(self, simulator: Contained, ask: Ask) -> None:
        super().__init__(limit=simulator.limit, batch_size=simulator.batch_size)
        self._shapes = simulator.state_shapes, simulator.param_shapes
        self._ask = ask

    @property
    def state_shapes(self) -> Shapes:
        return self._shapes[0]

    @property
    def param_shapes(self) -> Shapes:
        return self._shapes[1]

    def advance(self, state: State, params: State) -> State | Crash:
        (after,) = self.advance_all([(state, params)])
        return after

    def advance_all(self, pieces: Sequence[tuple[State, State]]) -> list[State | Crash]:
        found: list[State | Crash] = []
        for after, cost in self._ask([(_arrays(state), _arrays(params)) for state, params in pieces]):
            self._count(cost)
            found.append(after if isinstance(after, Crash) else _tensors(after))
        return found


def _arrays(tensors: State) -> Arrays:
    return {name: np.ascontiguousarray(value.detach().numpy()) for name, value in tensors.items()}


def _tensors(arrays: Arrays) -> State:
    # What comes over a wire may not be written into.
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
