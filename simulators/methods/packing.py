"""Named fields as one tensor and back: what a network's operators, and a black box between them, can carry.

{name: [N, …]}  ↔  [N, S],  the fields of a simulation one after the other, by the order of `shapes`
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from simulators.protocol import Fields, Shapes, State


@dataclass(frozen=True)
class Packing:
    """shapes: of one simulation, by name."""

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """S, the numbers of a simulation."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes.values()]

    def pack(self, fields: Fields) -> Tensor:
        """[N, S]. Fields that are not packed are left out."""
        return torch.cat([fields[name].reshape(len(fields[name]), -1) for name in self.shapes], 1)

    def unpack(self, flat: Tensor) -> State:
        """The fields of [N, S]."""
        if not self.shapes:
            return {}
        named = zip(self.shapes.items(), flat.split(self._sizes, 1), strict=True)
        return {name: part.unflatten(1, shape) if shape else part[:, 0] for (name, shape), part in named}


def required(shapes: Shapes, optional: frozenset[str]) -> Packing:
    """Of a simulator's state without what it can do without."""
    return Packing({name: shape for name, shape in shapes.items() if name not in optional})
