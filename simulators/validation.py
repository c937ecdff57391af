"""Exact solutions and physical quantities that simulations are compared with."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simulators.burgers import Burgers
from simulators.forcing import faces
from simulators.grid import Grid
from simulators.protocol import Fields

_WAVES = ((1, 0, 0.35, 0.3), (0, 1, 0.25, 1.1), (1, 1, 0.15, 2.0))
"""Of the Cole–Hopf potential: periods per domain in x and y, weight, phase. The weights sum to less than 1."""


def cole_hopf(grid: Grid, viscosity: float, time: float) -> Tensor:
    """An exact solution of Burgers' equation without force, [2, Y, X] at a periodic grid's faces, in float64.

        v = −2ν ∇φ/φ,   φ = 1 + Σ a exp(−ν|k|²t) cos(k·x + b)

    φ solves the heat equation and is positive. Source: Cole 1951, Hopf 1950.
    """
    components = []
    for component, (y, x) in enumerate(faces(grid)):
        potential, gradient = torch.ones_like(x), torch.zeros_like(x)
        for periods_x, periods_y, weight, phase in _WAVES:
            k = 2 * math.pi * periods_x / grid.size[1], 2 * math.pi * periods_y / grid.size[0]
            decayed = weight * math.exp(-viscosity * (k[0] ** 2 + k[1] ** 2) * time)
            angle = k[0] * x + k[1] * y + phase
            potential += decayed * angle.cos()
            gradient -= decayed * k[component] * angle.sin()
        components.append(-2 * viscosity * gradient / potential)
    return torch.stack(components)


def burgers_error(cells: int, steps: int, *, viscosity: float = 0.5, time: float = 1.0, eager: bool = False) -> float:
    """The root mean square error at `time`, over that of the solution, of a domain of 2π × 2π, in float64."""
    grid = Grid((cells, cells), (2 * math.pi, 2 * math.pi))
    simulator = Burgers(grid, dt=time / steps, viscosity=viscosity)
    state = {"velocity": cole_hopf(grid, viscosity, 0.0)[None]}
    still = {"force": torch.zeros_like(state["velocity"])}
    for _ in range(steps):
        state = simulator.eager(state, still) if eager else simulator.step(state, still)
    exact = cole_hopf(grid, viscosity, time)
    return float((state["velocity"][0] - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def order(steps: Sequence[float], errors: Sequence[float]) -> float:
    """The order of accuracy: the slope of ln(error) over ln(step), by least squares."""
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def boundary_flux(state: Fields, spacing: float) -> tuple[Tensor, Tensor]:
    """([N], [N]): what flows into a wake's domain over its lower edge, and the net flow out over all four edges.

    Volume per time and length. The second is zero where the velocity is free of divergence and nothing enters the disc.
    """
    velocity_y, velocity_x = state["velocity_y"], state["velocity_x"]
    through_y = velocity_y[:, -1].sum(1) - velocity_y[:, 0].sum(1)
    through_x = velocity_x[:, :, -1].sum(1) - velocity_x[:, :, 0].sum(1)
    return velocity_y[:, 0].sum(1) * spacing, (through_y + through_x) * spacing


def frequency(signal: Sequence[float], dt: float) -> float:
    """Of the strongest oscillation of a signal, per unit of time; the peak of a padded, windowed spectrum."""
    values = np.asarray(signal, dtype=float)
    values = (values - values.mean()) * np.hanning(len(values))
    padded = 16 * len(values)
    return float(np.abs(np.fft.rfft(values, padded)).argmax() / (padded * dt))


def strouhal(frequency: float, diameter: float, speed: float) -> float:
    """St = f·D/U."""
    return frequency * diameter / speed


def strouhal_of_cylinder(reynolds: float) -> float:
    """Of a circular cylinder in an unbounded flow: 0.212·(1 − 21.2/Re) for 50 < Re < 150 or so. Source: Roshko 1954."""
    return 0.212 * (1 - 21.2 / reynolds)


def without_blockage(strouhal_number: float, blockage: float, *, drag: float = 1.35) -> float:
    """St of a cylinder in a channel as it would be in an unbounded flow.

    St / (1 + C_D·β/4 + 0.82·β²), β the diameter over the width; C_D ≈ 1.35 for 100 < Re < 200.
    Source: Allen and Vincenti 1944.
    """
    return strouhal_number / (1 + drag * blockage / 4 + 0.82 * blockage**2)
