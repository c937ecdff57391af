"""Reference runs: one case of the data, computed on the fine grid and kept on the coarse one.

A case is a function of its seed or its Reynolds number: the same bits whether cases are computed alone or together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepzero_core.errors import RequestError, WorkError
from simulators import burgers, wake
from simulators.forcing import random_forcing, random_velocity
from simulators.grid import Grid
from simulators.protocol import State, alive
from simulators.resample import coarser


@dataclass(frozen=True)
class Case:
    """One reference run on the source grid.

    name: seed or Reynolds number, in words. frames: fields {name: [T, …]}; params: {name: [T, …]}, those of frame t are
    what the step from t to t + 1 needs.
    """

    name: str
    frames: State
    params: State


def burgers_cases(
    seeds: Sequence[int],
    *,
    reference: Grid = burgers.REFERENCE,
    factor: int = 4,
    skip: int = 30,
    frames: int = 200,
    dt: float = 0.1,
    viscosity: float = 0.1,
) -> list[Case]:
    """Forced Burgers' turbulence from a random velocity: `skip` frames are left out, then `frames` are kept.

    RequestError: a factor that does not divide the grid, no frames. WorkError: a reference run that diverges.
    """
    _check(reference, factor, skip, frames)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    forcings = [random_forcing(generator).on(reference) for generator in generators]
    start = torch.stack([random_velocity(generator, reference) for generator in generators]).float()
    simulator = burgers.Burgers(reference, dt=dt, viscosity=viscosity)
    state, kept, forces = {"velocity": start}, [], []
    for number in range(skip + frames):
        params = {"force": torch.stack([force(number * dt) for force in forcings]).float()}
        if number >= skip:
            kept.append(coarser(state, factor))
            forces.append(coarser(params, factor))
        if number + 1 < skip + frames:
            state = simulator.step(state, params)
    return _cases([f"seed {seed}" for seed in seeds], kept, forces)


def wake_cases(
    reynolds: Sequence[float],
    *,
    reference: Grid = wake.REFERENCE,
    factor: int = 4,
    skip: int = 1000,
    frames: int = 500,
    marker: bool = True,
) -> list[Case]:
    """The wake behind the disc from the first poke on: `skip` frames are left out, then `frames` are kept.

    RequestError: a factor that does not divide the grid, no frames, a Reynolds number below 97.7.
    WorkError: a reference run that diverges.
    """
    _check(reference, factor, skip, frames)
    simulator = wake.Wake(reference)
    params = {"reynolds": torch.tensor(reynolds, dtype=torch.float32)}
    state, kept = simulator.start(len(reynolds), marker=marker), []
    for number in range(skip + frames):
        if number >= skip:
            kept.append(coarser(state, factor))
        if number + 1 < skip + frames:
            state = simulator.step(state, params)
    return _cases([f"Re {number:g}" for number in reynolds], kept, [params] * frames)


def _check(reference: Grid, factor: int, skip: int, frames: int) -> None:
    reference.coarser(factor)
    if frames < 1 or skip < 0:
        raise RequestError(f"a case has at least one frame and skips none or more, not {frames} and {skip}")


def _cases(names: list[str], frames: list[State], params: list[State]) -> list[Case]:
    lost = [name for name, lives in zip(names, alive(frames[-1]).tolist(), strict=True) if not lives]
    if lost:
        raise WorkError(f"the reference run diverged: {', '.join(lost)}")

    def of(case: int, fields: list[State]) -> dict[str, Tensor]:
        return {name: torch.stack([frame[name][case] for frame in fields]) for name in fields[0]}

    return [Case(name, of(number, frames), of(number, params)) for number, name in enumerate(names)]
