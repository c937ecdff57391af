"""Attention as one operator of the graph.

Tracing takes scaled_dot_product_attention apart: two products, a softmax, and what brings their operands into shape.
Together they need not hold the T × T scores of every head and perturbation.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten._unsafe_view.default)


def attend(a: Tensor, b: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale·a·b)·v for every head: a [B, H, M, K], b [B, H, K, L], v [B, H, L, E] → [B, H, M, E]."""
    return torch.matmul(shares(a, b, scale), v)


def shares(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """softmax(scale·a·b), [B, H, M, L]."""
    return torch.matmul(scale * a, b).softmax(-1)


def fuse_attention(graph: GraphModule) -> None:
    """Put `attend` where a graph of ATen operators computes it; rewrites the graph in place."""
    for node in list(graph.graph.nodes):
        found = _find(node)
        if found is not None:
            with graph.graph.inserting_before(found.result):
                fused = graph.graph.call_function(attend, (*found.factors, found.scale))
            fused.meta["val"] = found.result.meta["val"]
            found.result.replace_all_uses_with(fused)
            for old in found.replaced:
                _erase_unread(graph, old)
    graph.recompile()


@dataclass(frozen=True)
class _Attention:
    factors: tuple[Node, Node, Node]
    scale: float
    result: Node
    replaced: tuple[Node, ...]


def _find(softmax: Node) -> _Attention | None:
    """The attention that a softmax is the middle of: nobody else reads the scores or what becomes of them."""
    if softmax.target not in (aten._softmax.default, aten._safe_softmax.default):
        return None
    operand, axis, *_ = cast(Any, softmax.args)
    shape = _shape(softmax)
    scores = _behind_reshapes(operand)
    mixed = _only_reader(softmax)
    if len(shape) != 4 or axis % 4 != 3 or mixed is None or len(scores.args) != 2 or len(mixed.args) != 2:
        return None
    result = next(iter(mixed.users)) if len(mixed.users) == 1 else None
    if scores.target is not aten.bmm.default or mixed.target is not aten.bmm.default or _only_reader(scores) != softmax:
        return None
    if result is None or result.target not in _RESHAPES or _behind_reshapes(mixed.args[0]) is not softmax:
        return None
    a, first = _factor(scores.args[0], shape)
    b, second = _factor(scores.args[1], shape)
    v, third = _factor(mixed.args[1], shape)
    if a is None or b is None or v is None or _shape(result) != (*shape[:3], _shape(v)[3]):
        return None
    return _Attention((a, b, v), first * second * third, result, (result,)) if third == 1 else None


def _unchanged(node: Node) -> bool:
    """Whether a node has its operand's values in the same order."""
    if node.target is aten.expand.default:
        return _shape(node) == _shape(cast(Node, node.args[0]))
    return node.target in (*_RESHAPES, aten.clone.default)


def _behind_reshapes(node: Any) -> Node:
    while _unchanged(node):
        node = node.args[0]
    return cast(Node, node)


def _only_reader(node: Node) -> Node | None:
    """The operator that alone reads a value, shapes aside."""
    while len(node.users) == 1:
        (node,) = node.users
        if not _unchanged(node):
            return node
    return None


def _factor(node: Any, scores: torch.Size) -> tuple[Node | None, float]:
    """The factor of every head, [B, H, ·, ·], that a batched product [B·H, ·, ·] reads, without the number that it is
    multiplied by, and that number."""
    while _unchanged(node) and len(_shape(node)) != 4:
        node = node.args[0]
    if len(_shape(node)) != 4 or _shape(node)[:2] != scores[:2]:
        return None, 1.0
    while len(_shape(node)) == 4 and _unchanged(node) and len(_shape(node.args[0])) == 4:
        node = node.args[0]
    if node.target is aten.mul.Scalar:
        return cast(Node, node.args[0]), float(node.args[1])
    return node, 1.0


def _erase_unread(graph: GraphModule, node: Node) -> None:
    """Take out a node that nobody reads, and what only it has read."""
    if node.users or node.op != "call_function":
        return
    operands = node.all_input_nodes
    graph.graph.erase_node(node)
    for operand in operands:
        _erase_unread(graph, operand)


def _shape(node: Node) -> torch.Size:
    value = node.meta["val"]
    shape: torch.Size = (value[0] if isinstance(value, (tuple, list)) else value).shape
    return shape
