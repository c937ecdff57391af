"""Training data of the loop, and what a trained corrector is tried on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepzero_core.errors import RequestError
from simulators.cases import Case
from simulators.methods.coupling import Coupling
from simulators.methods.sources import Loop
from simulators.protocol import Simulator, State, alive


class Windows:
    """Every run of m + 1 frames of every case: the first is where the solver begins, the others what it should reach.

    RequestError: cases with fewer than m + 1 frames.
    """

    def __init__(self, loop: Loop, cases: Sequence[Case]) -> None:
        self.loop, self.steps = loop, loop.steps
        packed, coupling = loop.packed, loop.coupling
        self._states = [packed.state.pack(case.frames) for case in cases]
        self._params = [
            packed.params.pack(case.params) if packed.params.shapes else states[:, :0]
            for case, states in zip(cases, self._states, strict=True)
        ]
        self._images = [coupling.image(case.frames).flatten(1) for case in cases]
        short = [case.name for case, states in zip(cases, self._states, strict=True) if len(states) <= self.steps]
        if short or not cases:
            raise RequestError(f"{self.steps} steps need cases of at least {self.steps + 1} frames: {', '.join(short)}")
        self._where = [
            (case, frame) for case, states in enumerate(self._states) for frame in range(len(states) - self.steps)
        ]

    def __len__(self) -> int:
        return len(self._where)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """inputs [B, S + m·P], targets [B, m, V]."""
        inputs, targets = [], []
        for case, frame in (self._where[index] for index in indices):
            end = frame + self.steps
            inputs.append(torch.cat([self._states[case][frame], self._params[case][frame:end].flatten()]))
            targets.append(self._images[case][frame + 1 : end + 1])
        return torch.stack(inputs), torch.stack(targets)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """All pairs of NON, for m = 1: S(x_t) and the step's parameters [n, S + P], and x_{t+1} [n, 1, V].

        The solver takes one step from every frame that has a next one. Pairs whose simulation dies are left out.
        """
        states = torch.cat([values[:-1] for values in self._states])
        params = torch.cat([values[:-1] for values in self._params])
        targets = torch.cat([values[1:] for values in self._images])
        with torch.no_grad():
            answer = self.loop.packed(torch.cat([states, params, torch.ones_like(states[:, :1])], 1))
        lives = answer[:, -1] > 0.5
        return torch.cat([answer[:, :-1], params], 1)[lives], targets[lives, None]


def roll_out(
    simulator: Simulator, coupling: Coupling, corrector: nn.Module | None, cases: Sequence[Case], steps: int
) -> Tensor:
    """The cases' first frames advanced together, corrected or (None) not: images [T, N, C, …], NaN from a death on.

    RequestError: cases with fewer parameters than steps.
    """
    short = [case.name for case in cases if len(next(iter(case.frames.values()))) < steps]
    if short or not cases:
        raise RequestError(f"{steps} steps need cases of at least as many frames: {', '.join(short)}")
    state = {name: torch.stack([case.frames[name][0] for case in cases]) for name in cases[0].frames}
    images = []
    with torch.no_grad():
        for number in range(steps):
            params = {name: torch.stack([case.params[name][number] for case in cases]) for name in cases[0].params}
            state = simulator.step(state, params)
            if corrector is not None:
                state = _corrected(state, params, coupling, corrector)
            images.append(coupling.image(state))
    return torch.stack(images)


def _corrected(state: State, params: State, coupling: Coupling, corrector: nn.Module) -> State:
    """The dead stay NaN: a network's batch statistics, if it has any, must not see them."""
    lives = alive(state)
    if not bool(lives.any()):
        return state
    some = {name: value[lives] for name, value in state.items()}
    given = {name: value[lives] for name, value in params.items()}
    changed = coupling.corrected(some, corrector(coupling.features(some, given)))
    rows = lives.nonzero()[:, 0]
    return {name: value.index_copy(0, rows, changed[name]) for name, value in state.items()}
