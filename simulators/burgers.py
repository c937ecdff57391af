"""Burgers' equation in two dimensions, periodic and forced, by PhiFlow.

    ∂v/∂t + (v·∇)v = ν ∇²v + F

A step is semi-Lagrangian advection, then explicit diffusion, then v + dt·F. Velocity and force sit at the faces of a
periodic grid, [N, 2, Y, X]: x at left edges, y at lower ones. ν is fixed and the same on every grid.

Source: Um et al. 2020 (Solver-in-the-loop).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from deepzero_core.errors import RequestError
from simulators.contained import Contained
from simulators.grid import Grid
from simulators.phiflow import Compiled, flow, run
from simulators.protocol import Shapes, State

SIZE = (32.0, 32.0)
SOURCE = Grid((32, 32), SIZE)
REFERENCE = Grid((128, 128), SIZE)
TRAIN_SEEDS = tuple(range(10))
TEST_SEEDS = tuple(range(100, 105))


class Burgers(Contained):
    """Burgers' equation on a grid.

    state:  velocity [N, 2, Y, X]
    params: force [N, 2, Y, X], of the step

    Diffusion takes as many substeps as keep ν·dt/dx² ≤ ¼ in each.
    """

    differentiable = True

    def __init__(
        self,
        grid: Grid = SOURCE,
        *,
        dt: float = 0.1,
        viscosity: float = 0.1,
        limit: float = 100.0,
        batch_size: int = 256,
    ) -> None:
        super().__init__(limit=limit, batch_size=batch_size)
        if not (dt > 0 and viscosity >= 0):
            raise RequestError(f"dt must be positive and the viscosity not negative, not {dt} and {viscosity}")
        self.grid, self.dt, self.viscosity = grid, dt, viscosity
        self.substeps = max(1, math.ceil(4 * viscosity * dt / grid.spacing**2))
        self._step = functools.partial(step, grid=grid, dt=dt, viscosity=viscosity, substeps=self.substeps)
        self._compiled = Compiled(self._step)

    @property
    def state_shapes(self) -> Shapes:
        return {"velocity": (2, *self.grid.cells)}

    @property
    def param_shapes(self) -> Shapes:
        return {"force": (2, *self.grid.cells)}

    def advance(self, state: State, params: State) -> State:
        velocity, force = state["velocity"], params["force"].to(state["velocity"])
        return {"velocity": torch.stack(self._compiled(*velocity.unbind(1), *force.unbind(1)), 1)}

    def eager(self, state: State, params: State) -> State:
        """The same step, operator by operator: the reference."""
        parts = run(self._step, *state["velocity"].unbind(1), *params["force"].unbind(1))
        return {"velocity": torch.stack(parts, 1)}


def step(
    velocity_x: Any,
    velocity_y: Any,
    force_x: Any,
    force_y: Any,
    *,
    grid: Grid,
    dt: float,
    viscosity: float,
    substeps: int,
) -> Sequence[Any]:
    """One step of PhiFlow's tensors; (v_x, v_y)."""
    phi = flow()
    bounds = phi.Box(y=grid.size[0], x=grid.size[1])
    both = phi.math.stack([velocity_y, velocity_x], phi.dual(vector="y,x"))
    velocity = phi.StaggeredGrid(both, phi.extrapolation.PERIODIC, bounds, y=grid.cells[0], x=grid.cells[1])
    velocity = phi.advect.semi_lagrangian(velocity, velocity, dt)
    velocity = phi.diffuse.explicit(velocity, viscosity, dt, substeps=substeps)
    return velocity.vector["x"].values + dt * force_x, velocity.vector["y"].values + dt * force_y
