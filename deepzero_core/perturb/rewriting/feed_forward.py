"""Two linear layers and a smooth function between them as one operator of the graph, of a transformer the larger half.

Together they need not hold the layer between them, four times as wide as what goes in and comes out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deepzero_core.perturb.rewriting.nodes import behind_reshapes, only_reader, replace_by

aten = torch.ops.aten

SMOOTH = (aten.gelu.default, aten.silu.default, aten.mish.default, aten.tanh.default, aten.sigmoid.default)


def feed_forward(
    bias: Tensor, weight: Tensor, inputs: Tensor, bias_2: Tensor, weight_2: Tensor, function: Any,
    arguments: Sequence[Any], keywords: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """f(x·W + c)·W₂ + c₂: x [M, K], W [K, N], W₂ [N, E] → [M, E]. `function` f takes further arguments."""
    hidden: Tensor = function(torch.addmm(bias, inputs, weight), *arguments, **keywords)
    return torch.addmm(bias_2, hidden, weight_2)


def fuse_feed_forward(graph: GraphModule) -> None:
    """Put `feed_forward` where a graph of ATen operators computes it."""
    for node in list(graph.graph.nodes):
        if node.target not in SMOOTH:
            continue
        into, out_of = behind_reshapes(node.args[0]), only_reader(node)
        if out_of is None or not _linear(into) or not _linear(out_of):
            continue
        if only_reader(into) is node and behind_reshapes(out_of.args[1]) is node:
            (bias, inputs, weight), (bias_2, _, weight_2) = into.args, out_of.args
            further = (node.target, tuple(node.args[1:]), dict(node.kwargs))
            replace_by(out_of, feed_forward, bias, weight, inputs, bias_2, weight_2, *cast(Any, further))


def _linear(node: Node) -> bool:
    return node.target is aten.addmm.default and not node.kwargs
