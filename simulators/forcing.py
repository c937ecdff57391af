"""Random velocities and forces as sums of sines: functions of place and time, to be had on any grid.

Vectors are [2]: x, y. Everything is drawn from a seed on the CPU in float64 and is the same on every machine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simulators.grid import Grid

MODES = 8
"""Wave numbers of a random velocity, in periods per domain along each axis: beyond, they have no weight to speak of."""


@dataclass(frozen=True)
class Forcing:
    """F(x, t) = Σᵢ aᵢ sin(kᵢ·x + φᵢ + ωᵢt).

    amplitude: [n, 2]; wave_vector: [n, 2], radians per length; phase, frequency: [n], the latter in radians per time.
    The waves are not periods of the domain: the force jumps at its edge, as it does in the source of this set-up.
    """

    amplitude: Tensor
    wave_vector: Tensor
    phase: Tensor
    frequency: Tensor

    def on(self, grid: Grid) -> Callable[[float], Tensor]:
        """The force at the faces of a periodic grid as a function of time: t → [2, Y, X] in float64."""
        angles = [self.wave_vector @ torch.stack([x.flatten(), y.flatten()]) for y, x in faces(grid)]
        waves = torch.stack([torch.cat([angle.sin(), angle.cos()]) for angle in angles])

        def force(time: float) -> Tensor:
            # sin(k·x + b) = sin(k·x) cos b + cos(k·x) sin b: the sines of places are computed once.
            moment = self.phase + time * self.frequency
            weights = torch.cat([moment.cos(), moment.sin()]) * self.amplitude.T.repeat(1, 2)
            return torch.einsum("ck,ckp->cp", weights, waves).view(2, *grid.cells)

        return force


def random_forcing(generator: torch.Generator, count: int = 20) -> Forcing:
    """`count` sines: |k| 0.8 to 1.6, amplitudes ±0.15, any phase, ω ±0.4; all uniform. Source: Um et al. 2020."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    angle, length = uniform(count) * math.pi, 0.8 + 0.8 * uniform(count)
    return Forcing(
        amplitude=0.3 * (uniform(count, 2) - 0.5),
        wave_vector=length[:, None] * torch.stack([angle.sin(), angle.cos()], 1),
        phase=2 * math.pi * uniform(count),
        frequency=0.8 * uniform(count) - 0.4,
    )


def random_velocity(generator: torch.Generator, grid: Grid, *, deviation: float = 2.0, power: float = 8.0) -> Tensor:
    """[2, Y, X] at the faces of a periodic grid, in float64: zero mean, a given standard deviation, smooth.

    Amplitudes fall as (1 + |k|)^−power with the wave number k in periods per domain.
    """
    waves = torch.cartesian_prod(*[torch.arange(-MODES, MODES + 1, dtype=torch.float64)] * 2)
    waves = waves[len(waves) // 2 + 1 :]  # the other half are the same sines
    weights = (1 + waves.norm(dim=1)) ** -power
    fields = []
    for y, x in faces(grid):
        cosines, sines = weights * torch.randn(2, len(waves), generator=generator, dtype=torch.float64)
        angle = 2 * math.pi * (waves[:, 0, None, None] * x / grid.size[1] + waves[:, 1, None, None] * y / grid.size[0])
        field = torch.einsum("k,kyx->yx", cosines, angle.cos()) + torch.einsum("k,kyx->yx", sines, angle.sin())
        # The deviation of the function, not of its values on this grid: every grid has the same velocity.
        fields.append(deviation * field / ((cosines**2 + sines**2).sum() / 2).sqrt())
    return torch.stack(fields)


def faces(grid: Grid) -> list[tuple[Tensor, Tensor]]:
    """(y, x), each [Y, X] in float64, of the left edges and of the lower edges of the cells."""
    y, x = (torch.arange(cells, dtype=torch.float64) * grid.spacing for cells in grid.cells)
    half = grid.spacing / 2
    return [tuple(torch.meshgrid(y + half, x, indexing="ij")), tuple(torch.meshgrid(y, x + half, indexing="ij"))]  # type: ignore[list-item]
