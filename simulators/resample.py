"""From a fine grid to a coarser one of the same domain: means over what a coarse cell or face consists of.

    centred        [..., Y, X]        the mean of factor × factor cells
    faces          every factor-th row or column of faces, the mean of the `factor` fine faces along each coarse one

The flow through a coarse face is that through the fine ones: what was free of divergence stays so.
"""

import torch
from torch import Tensor

from deepzero_core.errors import RequestError, suggest
from simulators.protocol import Fields, State


def centred(value: Tensor, factor: int) -> Tensor:
    """[..., Y, X] → [..., Y/factor, X/factor]."""
    return _mean(_mean(value, factor, -2), factor, -1)


def faces_y(value: Tensor, factor: int) -> Tensor:
    """Lower edges: [..., Y (+ 1), X] → [..., Y/factor (+ 1), X/factor], with the last row of faces or without it."""
    return _mean(value[..., ::factor, :], factor, -1)


def faces_x(value: Tensor, factor: int) -> Tensor:
    """Left edges: [..., Y, X (+ 1)] → [..., Y/factor, X/factor (+ 1)]."""
    return _mean(value[..., ::factor], factor, -2)


def vectors(value: Tensor, factor: int) -> Tensor:
    """x at left edges and y at lower ones of a periodic grid: [..., 2, Y, X] → [..., 2, Y/factor, X/factor]."""
    x, y = value.unbind(-3)
    return torch.stack([faces_x(x, factor), faces_y(y, factor)], -3)


_BY_NAME = {
    "velocity_y": faces_y,
    "velocity_x": faces_x,
    "marker": centred,
    "velocity": vectors,
    "force": vectors,
}


def coarser(fields: Fields, factor: int) -> State:
    """Every field on a grid `factor` times coarser, by its name; numbers without a place, [N], stay as they are.

    RequestError: a field of another name; cells that the factor does not divide.
    """
    resampled = {}
    for name, value in fields.items():
        if value.ndim == 1:
            resampled[name] = value
        elif name in _BY_NAME:
            resampled[name] = _BY_NAME[name](value, factor)
        else:
            raise RequestError(f"nothing is known of where the field {name!r} sits: {suggest(name, _BY_NAME)}")
    return resampled


def _mean(value: Tensor, factor: int, axis: int) -> Tensor:
    if value.shape[axis] % factor:
        raise RequestError(f"{value.shape[axis]} cells or faces cannot be made {factor} times fewer")
    return value.unflatten(axis, (-1, factor)).mean(axis)  # the second of the two axes, as it counts from the end
