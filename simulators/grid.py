"""The grids that simulations live on, and how fields sit on them.

A cell is [y, x], the first row at y = 0. Velocity components sit at the faces that they cross (a staggered, or MAC,
grid): `velocity_y` at the lower and upper edges of cells, `velocity_x` at the left and right ones.

    bounded    velocity_y [N, Y + 1, X], velocity_x [N, Y, X + 1], centred fields [N, Y, X]
    periodic   velocity [N, 2, Y, X]: the x component at left edges, then the y component at lower ones
"""

import math
from dataclasses import dataclass

from deepzero_core.errors import RequestError


@dataclass(frozen=True)
class Grid:
    """cells: (Y, X). size: (height, width) in units of length. Cells are square.

    RequestError: fewer than two cells along an axis, a size that is not positive, cells that are not square.
    """

    cells: tuple[int, int]
    size: tuple[float, float]

    def __post_init__(self) -> None:
        if min(self.cells) < 2:
            raise RequestError(f"a grid has at least 2 cells along each axis, not {self.cells}")
        if not all(0 < length < math.inf for length in self.size):
            raise RequestError(f"the size of a grid must be positive and finite, not {self.size}")
        dy, dx = (length / cells for length, cells in zip(self.size, self.cells, strict=True))
        if not math.isclose(dy, dx, rel_tol=1e-9):
            raise RequestError(f"the cells of a grid must be square; {self.cells} cells of {self.size} are {dy} × {dx}")

    @property
    def spacing(self) -> float:
        """The edge of a cell."""
        return self.size[1] / self.cells[1]

    def coarser(self, factor: int) -> "Grid":
        """The same domain with cells `factor` times larger.

        RequestError: a factor that does not divide both numbers of cells.
        """
        if factor < 1 or any(cells % factor for cells in self.cells):
            raise RequestError(f"a grid of {self.cells} cells cannot be coarsened {factor} times")
        y, x = (cells // factor for cells in self.cells)
        return Grid((y, x), self.size)

    def finer(self, factor: int) -> "Grid":
        """The same domain with cells `factor` times smaller."""
        y, x = (cells * factor for cells in self.cells)
        return Grid((y, x), self.size)
