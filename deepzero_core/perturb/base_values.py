"""What the base pass leaves behind: the value of every node, where that is worth its memory.

Two kinds of values between operators that run as programs are not kept as they are: rectifiers' results, which are
computed again when somebody asks, and what programs read, which is kept in slices alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from deepzero_core.perturb.native import program

aten = torch.ops.aten

_CHEAP = {aten.relu.default, aten.leaky_relu.default}


class BaseValues(dict[Node, Any]):
    """Base values by node."""

    def __init__(self) -> None:
        super().__init__()
        self._likeness: dict[Node, Tensor] = {}
        self._slices: dict[Node, Tensor] = {}

    def __missing__(self, node: Node) -> Any:
        if node in self._slices:
            return program.from_slices(self._slices[node], len(self._likeness[node]))
        if node in self._likeness:
            assert callable(node.target)
            return node.target(*bases(node.args, self))
        raise KeyError(node)

    def release(self, node: Node) -> None:
        """Let a value go that nothing else in the base pass reads, where it is cheap to compute again."""
        if node.target in _CHEAP and program.suits(self[node]):
            self._forget(node)

    def sliced(self, node: Node) -> Tensor:
        """A value [B, C, *space] in slices, and from now on only so."""
        if node not in self._slices:
            self._slices[node] = program.in_slices(self[node])
            if node not in self._likeness:
                self._forget(node)
        return self._slices[node]

    def _forget(self, node: Node) -> None:
        value = self.pop(node)
        self._likeness[node] = value.new_empty(1).expand(value.shape)

    def like(self, node: Node) -> Tensor:
        """A tensor of a value's shape, type and device, of several results the first; whatever is in it."""
        return self._likeness[node] if node in self._likeness else self.first(node)

    def first(self, node: Node) -> Tensor:
        """A node's value; of several results the first."""
        value = self[node]
        first: Tensor = value[0] if isinstance(value, (tuple, list)) else value
        return first


def bases(arguments: Any, values: BaseValues) -> Any:
    """A node's arguments with base values in place of nodes."""
    return torch.fx.node.map_arg(arguments, values.__getitem__)
