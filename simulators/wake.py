"""Unsteady wake flow: a disc in a channel sheds vortices; incompressible Navier–Stokes in two dimensions, by PhiFlow.

    ∂v/∂t + (v·∇)v = −∇p + ν ∇²v,   ∇·v = 0,   ν = U·D/Re

Domain 100 × 200 (x × y), disc of radius 10 at (50, 50), inflow U = 1 along y, dt = 1. A step is explicit diffusion,
boundary values (v_y = 1 on the first two rows of faces and in the first and last column), semi-Lagrangian advection
of marker and velocity, and pressure projection. All sides are open. Re is that of the disc's diameter D = 20.

Source: Um et al. 2020 (Solver-in-the-loop), with a viscosity that does not depend on the grid.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepzero_core.errors import RequestError
from simulators.contained import Contained
from simulators.grid import Grid
from simulators.phiflow import Compiled, flow, run
from simulators.pressure import Projection
from simulators.protocol import Shapes, State

SIZE = (200.0, 100.0)
CENTRE = (50.0, 50.0)
RADIUS = 10.0
INFLOW = 1.0
MARKER_BOX = ((5.0, 10.0), (25.0, 75.0))
"""Where marker is fed in: (y from, to), (x from, to)."""

SOURCE = Grid((64, 32), SIZE)
REFERENCE = Grid((256, 128), SIZE)
TRAIN_REYNOLDS = (97.7, 195.3, 390.6, 781.3, 1562.5, 3125.0)
TEST_REYNOLDS = (146.5, 293.0, 585.9, 1171.9, 2343.8)


class Wake(Contained):
    """The wake flow on a grid.

    state:  velocity_y [N, Y + 1, X], velocity_x [N, Y, X + 1] and, where it is wanted, marker [N, Y, X]
    params: reynolds [N]

    lowest_reynolds: the most viscous simulation that will be asked for; the substeps of explicit diffusion follow from
    it (ν·dt/dx² ≤ ¼ in each), the same for all, so that no simulation depends on those beside it.
    centre: (y, x) of the disc. The domain is the grid's.
    channel: walls without friction to the left and right, and an inflow that is fixed, in place of sides that are open:
    what the literature on wakes computes. The set-up's disc sheds more slowly than that, because its flow can give way.

    RequestError: a Reynolds number below the lowest, or not positive; a disc that is not inside the domain.
    """

    optional = frozenset({"marker"})
    differentiable = True

    def __init__(
        self,
        grid: Grid = SOURCE,
        *,
        centre: tuple[float, float] = CENTRE,
        channel: bool = False,
        dt: float = 1.0,
        lowest_reynolds: float = TRAIN_REYNOLDS[0],
        limit: float = 20 * INFLOW,
        batch_size: int = 256,
    ) -> None:
        super().__init__(limit=limit, batch_size=batch_size)
        margins = zip(centre, grid.size, strict=True)
        if any(not RADIUS < place < length - RADIUS for place, length in margins):
            raise RequestError(f"a disc of radius {RADIUS} at {centre} (y, x) is not inside a domain of {grid.size}")
        if not (dt > 0 and lowest_reynolds > 0):
            raise RequestError(f"dt and lowest_reynolds must be positive, not {dt} and {lowest_reynolds}")
        self.grid, self.centre, self.dt, self.lowest_reynolds = grid, centre, dt, lowest_reynolds
        self.substeps = max(1, math.ceil(4 * viscosity(lowest_reynolds) * dt / grid.spacing**2))
        self.projection = Projection(_fluid(grid, centre), grid.spacing, channel=channel)
        self._transport = Compiled(functools.partial(transport, grid=grid, dt=dt, substeps=self.substeps))
        self._with_marker = Compiled(functools.partial(transport_marker, grid=grid, dt=dt, substeps=self.substeps))

    @property
    def state_shapes(self) -> Shapes:
        y, x = self.grid.cells
        return {"velocity_y": (y + 1, x), "velocity_x": (y, x + 1), "marker": (y, x)}

    @property
    def param_shapes(self) -> Shapes:
        return {"reynolds": ()}

    def start(self, count: int, *, dtype: torch.dtype = torch.float32, marker: bool = False) -> State:
        """The flow that simulations begin with: U everywhere, and a sideways poke behind the disc that starts shedding.

        The poke is as large on every grid; on the reference grid it is that of the source of this set-up.
        """
        y, x = self.grid.cells
        velocity_x = torch.zeros(count, y, x + 1, dtype=dtype)
        reference = REFERENCE.spacing / self.grid.spacing
        behind = self.centre[0] / self.grid.spacing + 64 * reference
        rows = slice(round(behind + 10 * reference), round(behind + 20 * reference))
        half = max(1, round(2 * reference))
        middle = round(self.centre[1] / self.grid.spacing)
        velocity_x[:, rows, middle - half : middle + half] = INFLOW
        state = {"velocity_y": torch.full((count, y + 1, x), INFLOW, dtype=dtype), "velocity_x": velocity_x}
        return state | ({"marker": torch.zeros(count, y, x, dtype=dtype)} if marker else {})

    def advance(self, state: State, params: State) -> State:
        reynolds = self._viscous_enough(params["reynolds"]).to(state["velocity_y"])
        velocity = state["velocity_y"], state["velocity_x"]
        if "marker" in state:
            velocity_y, velocity_x, marker = self._with_marker(*velocity, state["marker"], reynolds)
            after = {"marker": marker}
        else:
            velocity_y, velocity_x = self._transport(*velocity, reynolds)
            after = {}
        velocity_y, velocity_x = self.projection(velocity_y, velocity_x)
        return {"velocity_y": velocity_y, "velocity_x": velocity_x} | after

    def eager(self, state: State, params: State, *, tolerance: float = 1e-5) -> State:
        """The same step by PhiFlow alone, operator by operator, its pressure by conjugate gradients: the reference."""
        step = functools.partial(
            whole_step,
            grid=self.grid,
            dt=self.dt,
            substeps=self.substeps,
            tolerance=tolerance,
            projection=self.projection,
        )
        velocity_y, velocity_x = run(step, state["velocity_y"], state["velocity_x"], params["reynolds"])
        return {"velocity_y": velocity_y, "velocity_x": velocity_x}

    def _viscous_enough(self, reynolds: Tensor) -> Tensor:
        lowest = float(reynolds.detach().min())
        # A number that went through float32 must still be the lowest.
        if not lowest >= self.lowest_reynolds * (1 - 1e-6):
            raise RequestError(
                f"a Reynolds number of {lowest:g} is below lowest_reynolds ({self.lowest_reynolds:g}), for which the "
                "substeps of diffusion were chosen"
            )
        return reynolds


def viscosity(reynolds: Any) -> Any:
    """ν = U·D/Re."""
    return INFLOW * 2 * RADIUS / reynolds


def velocity_field(velocity_y: Any, velocity_x: Any, grid: Grid) -> Any:
    phi = flow()
    bounds = phi.Box(y=grid.size[0], x=grid.size[1])
    y, x = grid.cells
    both = phi.math.stack([velocity_y, velocity_x], phi.dual(vector="y,x"))
    return phi.StaggeredGrid(both, phi.ZERO_GRADIENT, bounds, y=y, x=x)


def transport(
    velocity_y: Any, velocity_x: Any, reynolds: Any, *, grid: Grid, dt: float, substeps: int
) -> Sequence[Any]:
    """Diffusion, boundary values and advection of PhiFlow's tensors; (v_y, v_x)."""
    velocity = _bounded(velocity_y, velocity_x, reynolds, grid, dt, substeps)
    return _components(flow().advect.semi_lagrangian(velocity, velocity, dt))


def transport_marker(
    velocity_y: Any, velocity_x: Any, marker: Any, reynolds: Any, *, grid: Grid, dt: float, substeps: int
) -> Sequence[Any]:
    """The same and marker, with what flows in, in the same velocity; (v_y, v_x, marker)."""
    phi = flow()
    velocity = _bounded(velocity_y, velocity_x, reynolds, grid, dt, substeps)
    y, x = grid.cells
    bounds = phi.Box(y=grid.size[0], x=grid.size[1])
    fed = marker + phi.wrap(_inside(grid, *MARKER_BOX).astype(float), phi.spatial("y,x"))
    field = phi.CenteredGrid(fed, phi.ZERO_GRADIENT, bounds, y=y, x=x)
    moved = phi.advect.semi_lagrangian(field, velocity, dt)
    return *_components(phi.advect.semi_lagrangian(velocity, velocity, dt)), moved.values


def whole_step(
    velocity_y: Any,
    velocity_x: Any,
    reynolds: Any,
    *,
    grid: Grid,
    dt: float,
    substeps: int,
    tolerance: float,
    projection: Projection,
) -> Sequence[Any]:
    """Everything by PhiFlow; of the projection, only where faces are open."""
    phi = flow()
    sizes = dict(zip("yx", grid.cells, strict=True))
    open_y, open_x, flows_y, fluid = (
        phi.wrap(mask.numpy().astype(float), phi.spatial("y,x"))
        for mask in (projection.open_y, projection.open_x, projection.flows_y, projection.fluid)
    )
    velocity_y, velocity_x = transport(velocity_y, velocity_x, reynolds, grid=grid, dt=dt, substeps=substeps)
    velocity = velocity_field(velocity_y * flows_y, velocity_x * open_x, grid)
    closed = velocity_field(open_y, open_x, grid)
    active = phi.CenteredGrid(fluid, phi.extrapolation.NONE, velocity.bounds, **sizes)
    system = (velocity.boundary, closed, active)
    guess = phi.CenteredGrid(phi.math.zeros(phi.batch(velocity)), 0, velocity.bounds, **sizes)
    solve = phi.Solve("CG", tolerance, x0=guess)
    divergence = phi.field.divergence(velocity) * active
    pressure = phi.math.solve_linear(_laplacian(phi.math.get_precision()), divergence, solve, *system)
    gradient = phi.field.spatial_gradient(pressure, velocity.boundary, at="face") * closed
    return _components(velocity - gradient)


@functools.cache
def _laplacian(bits: int) -> Any:
    """PhiFlow's, one for each precision: it keeps its matrix in that of the first velocity it meets."""
    phi = flow()
    return phi.math.jit_compile_linear(phi.fluid.masked_laplace.f)


def _bounded(velocity_y: Any, velocity_x: Any, reynolds: Any, grid: Grid, dt: float, substeps: int) -> Any:
    phi = flow()
    velocity = velocity_field(velocity_y, velocity_x, grid)
    velocity_y, velocity_x = _components(phi.diffuse.explicit(velocity, viscosity(reynolds), dt, substeps=substeps))
    free = phi.wrap(1.0 - _held(grid), phi.spatial("y,x"))
    return velocity_field(velocity_y * free + INFLOW * (1 - free), velocity_x, grid)


def _components(velocity: Any) -> tuple[Any, Any]:
    return velocity.vector["y"].values, velocity.vector["x"].values


def _held(grid: Grid) -> np.ndarray:
    """Where v_y is kept at the inflow: 1, elsewhere 0, [Y + 1, X]."""
    held = np.zeros((grid.cells[0] + 1, grid.cells[1]))
    held[:2] = held[:, 0] = held[:, -1] = 1.0
    return held


def _centres(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """y [Y, 1] and x [1, X] of the cells' centres."""
    y, x = ((np.arange(cells) + 0.5) * grid.spacing for cells in grid.cells)
    return y[:, None], x[None]


def _inside(grid: Grid, rows: tuple[float, float], columns: tuple[float, float]) -> np.ndarray:
    y, x = _centres(grid)
    return (rows[0] <= y) & (y < rows[1]) & (columns[0] <= x) & (x < columns[1])


def _fluid(grid: Grid, centre: tuple[float, float]) -> np.ndarray:
    """Cells whose centre is outside the disc, bool [Y, X]."""
    y, x = _centres(grid)
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 > RADIUS**2
