"""Making a velocity free of divergence around an obstacle: one matrix, factored once, for any number of simulations.

    ∇·(H ∇p) = ∇·v  in fluid cells,   v ← v − H ∇p

H is 1 at faces between two fluid cells and at the open edges of the domain, outside which p = 0; it is 0 at the
obstacle's faces, at walls and at a fixed inflow. Velocities: velocity_y [N, Y + 1, X], velocity_x [N, Y, X + 1].
"""

from typing import Any

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

_AT_ONCE = 8
"""Right-hand sides that are solved together: as fast as more, they stay in the cache, and always as many, so that the
bits of a solution do not depend on how many others are asked for."""


class Factored:
    """A sparse matrix A [n, n] and its factors, computed when first needed."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = sparse.csc_array(matrix)
        self._factors: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"matrix": self.matrix, "_factors": None}

    def solve(self, rhs: Tensor, *, transposed: bool = False) -> Tensor:
        """A⁻¹b, or A⁻ᵀb, for every row of b [N, n], in float64 whatever the type of b. Not differentiable."""
        if self._factors is None:
            # Minimum degree of A + Aᵀ: A's pattern is symmetric and its diagonal dominates.
            options = {"SymmetricMode": True}
            self._factors = splu(self.matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        values = rhs.detach().to("cpu", torch.float64).numpy()
        padded = np.zeros((-(-len(values) // _AT_ONCE) * _AT_ONCE, values.shape[1]))
        padded[: len(values)] = values
        for start in range(0, len(padded), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            padded[some] = self._factors.solve(padded[some].T, trans="T" if transposed else "N").T
        return torch.from_numpy(padded[: len(values)]).to(rhs)


class _Solve(torch.autograd.Function):
    """x = A⁻¹b. The adjoint of b is A⁻ᵀ times that of x, by the same factors."""

    @staticmethod
    def forward(ctx: Any, rhs: Tensor, factored: Factored) -> Tensor:
        ctx.factored = factored
        return factored.solve(rhs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factored.solve(gradient, transposed=True), None


class Projection:
    """v ↦ v − H ∇p, linear in v and differentiable.

    fluid: bool [Y, X], false inside the obstacle. spacing: the edge of a cell.
    channel: walls to the left and to the right and an inflow at the lower edge that stays as it is; else all is open.
    """

    def __init__(self, fluid: np.ndarray, spacing: float, *, channel: bool = False) -> None:
        self.spacing = spacing
        self.fluid = torch.from_numpy(fluid)
        padded = np.pad(fluid, 1, constant_values=True)
        self.open_y = torch.from_numpy(padded[:-1, 1:-1] & padded[1:, 1:-1])
        self.open_x = torch.from_numpy(padded[1:-1, :-1] & padded[1:-1, 1:])
        self.flows_y = self.open_y.clone()
        if channel:
            self.open_x[:, [0, -1]] = self.open_y[0] = False
        self.system = Factored(self._matrix())

    def _matrix(self) -> Any:
        """∇·H∇ in fluid cells and the identity, scaled alike, in the others, where p is of no consequence."""
        cells_y, cells_x = self.fluid.shape
        gradient_y = sparse.kron(_differences(cells_y), sparse.eye_array(cells_x))
        gradient_x = sparse.kron(sparse.eye_array(cells_y), _differences(cells_x))
        laplacian = -(
            gradient_y.T @ _diagonal(self.open_y) @ gradient_y + gradient_x.T @ _diagonal(self.open_x) @ gradient_x
        )
        fluid = _diagonal(self.fluid)
        solid = _diagonal(~self.fluid)
        return (fluid @ laplacian - 4 * solid) / self.spacing**2

    def divergence(self, velocity_y: Tensor, velocity_x: Tensor) -> Tensor:
        """∇·v of fluid cells [N, Y, X], zero in the others."""
        return (velocity_y.diff(dim=1) + velocity_x.diff(dim=2)) / self.spacing * self.fluid

    def pressure(self, velocity_y: Tensor, velocity_x: Tensor) -> Tensor:
        """p [N, Y, X]."""
        divergence = self.divergence(velocity_y, velocity_x)
        solved: Tensor = _Solve.apply(divergence.flatten(1), self.system)
        return solved.view_as(divergence)

    def __call__(self, velocity_y: Tensor, velocity_x: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity without divergence and without flow through the obstacle's faces."""
        velocity_y, velocity_x = velocity_y * self.flows_y, velocity_x * self.open_x
        padded = torch.nn.functional.pad(self.pressure(velocity_y, velocity_x), (1, 1, 1, 1))
        gradient_y = padded[:, :, 1:-1].diff(dim=1) / self.spacing
        gradient_x = padded[:, 1:-1].diff(dim=2) / self.spacing
        return velocity_y - gradient_y * self.open_y, velocity_x - gradient_x * self.open_x


def _differences(cells: int) -> Any:
    """[cells + 1, cells]: differences over every face of a row of cells, zero outside it."""
    ones = np.ones(cells)
    return sparse.diags_array([ones, -ones], offsets=[0, -1], shape=(cells + 1, cells))


def _diagonal(mask: Tensor) -> Any:
    return sparse.diags_array(mask.flatten().double().numpy())
