"""What rewrites ask of a node."""

from typing import Any, cast

import torch
from torch.fx import Node

aten = torch.ops.aten

RESHAPES = (aten.view.default, aten._unsafe_view.default)


def shape_of(node: Any) -> torch.Size:
    """Of the value that a node had in the trace; of several the first."""
    value = node.meta["val"]
    shape: torch.Size = (value[0] if isinstance(value, (tuple, list)) else value).shape
    return shape


def unchanged(node: Node) -> bool:
    """Whether a node has its operand's values in the same order."""
    if node.target is aten.expand.default:
        return shape_of(node) == shape_of(node.args[0])
    return node.target in (*RESHAPES, aten.clone.default)


def behind_reshapes(node: Any) -> Node:
    """The node whose values these are, in another shape."""
    while unchanged(node):
        node = node.args[0]
    return cast(Node, node)


def only_reader(node: Node) -> Node | None:
    """The operator that alone reads a value, in whatever shape."""
    while len(node.users) == 1:
        (node,) = node.users
        if not unchanged(node):
            return node
    return None


def replace_by(node: Node, target: Any, *arguments: Any) -> None:
    """Put another operator in a node's place, and take out what nobody reads any more."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, arguments)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    _erase_unread(node)


def _erase_unread(node: Node) -> None:
    if node.users or node.op != "call_function":
        return
    operands = node.all_input_nodes
    node.graph.erase_node(node)
    for operand in operands:
        _erase_unread(operand)
