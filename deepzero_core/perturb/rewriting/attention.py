"""Attention as one operator of the graph.

Tracing takes scaled_dot_product_attention apart: two products, a softmax, and what brings their operands into shape.
Together they need not hold the T × T scores of every head and perturbation.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deepzero_core.perturb.rewriting.nodes import (
    RESHAPES,
    behind_reshapes,
    only_reader,
    replace_by,
    shape_of,
    unchanged,
)

aten = torch.ops.aten


def attend(a: Tensor, b: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale·a·b)·v for every head: a [B, H, M, K], b [B, H, K, L], v [B, H, L, E] → [B, H, M, E]."""
    return torch.matmul(shares(a, b, scale), v)


def shares(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """softmax(scale·a·b), [B, H, M, L]."""
    return torch.matmul(scale * a, b).softmax(-1)


def fuse_attention(graph: GraphModule) -> None:
    """Put `attend` where a graph of ATen operators computes it."""
    for node in list(graph.graph.nodes):
        if node.target in (aten._softmax.default, aten._safe_softmax.default):
            found = _around(node)
            if found is not None:
                replace_by(found.result, attend, *found.factors, found.scale)


@dataclass(frozen=True)
class _Attention:
    factors: tuple[Node, Node, Node]
    scale: float
    result: Node


def _around(softmax: Node) -> _Attention | None:
    """The attention that a softmax is the middle of: nobody else reads the scores or what becomes of them."""
    shape, axis = shape_of(softmax), cast(int, softmax.args[1])
    scores, mixed = behind_reshapes(softmax.args[0]), only_reader(softmax)
    if len(shape) != 4 or axis % 4 != 3 or mixed is None or len(mixed.users) != 1:
        return None
    (result,) = mixed.users
    if scores.target is not aten.bmm.default or mixed.target is not aten.bmm.default or result.target not in RESHAPES:
        return None
    if only_reader(scores) is not softmax or behind_reshapes(mixed.args[0]) is not softmax:
        return None
    found = [_factor(operand, shape) for operand in (*scores.args, mixed.args[1])]
    if any(factor is None for factor in found):
        return None
    (a, first), (b, second), (v, third) = cast(list[tuple[Node, float]], found)
    if third != 1 or shape_of(result) != (*shape[:3], shape_of(v)[3]):
        return None
    return _Attention((a, b, v), first * second, result)


def _factor(node: Any, scores: torch.Size) -> tuple[Node, float] | None:
    """The node [B, H, ·, ·] behind a factor [B·H, ·, ·] of a batched product, and the number that it is taken times."""
    while unchanged(node) and not _by_head(node, scores):
        node = node.args[0]
    while unchanged(node) and _by_head(node.args[0], scores):
        node = node.args[0]
    if not _by_head(node, scores):
        return None
    return (node.args[0], float(node.args[1])) if node.target is aten.mul.Scalar else (node, 1.0)


def _by_head(node: Node, scores: torch.Size) -> bool:
    shape = shape_of(node)
    return len(shape) == 4 and shape[:2] == scores[:2]
