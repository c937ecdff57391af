"""What the base pass leaves behind: the value of every node, where that is worth its memory."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from deepzero_core.perturb.native import program

aten = torch.ops.aten

_CHEAP = {aten.relu.default, aten.leaky_relu.default}


class BaseValues(dict[Node, Any]):
    """Base values by node. What `release` has let go is computed again when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[Node, torch.Size] = {}

    def __missing__(self, node: Node) -> Any:
        if node not in self._shapes:
            raise KeyError(node)
        assert callable(node.target)
        return node.target(*bases(node.args, self))

    def release(self) -> None:
        """Let go of the rectifiers' results between operators that run as programs: these do without most of them."""
        for node in [node for node, value in self.items() if node.target in _CHEAP and program.suits(value)]:
            self._shapes[node] = self.pop(node).shape

    def shape(self, node: Node) -> torch.Size:
        """Of a node's value; of several results the first."""
        return self._shapes[node] if node in self._shapes else self.first(node).shape

    def first(self, node: Node) -> Tensor:
        """A node's value; of several results the first."""
        value = self[node]
        first: Tensor = value[0] if isinstance(value, (tuple, list)) else value
        return first


def bases(arguments: Any, values: BaseValues) -> Any:
    """A node's arguments with base values in place of nodes."""
    return torch.fx.node.map_arg(arguments, values.__getitem__)
