"""The last linear layer and the cross-entropy of its scores as one operator of the graph.

Together they need not hold the scores of every perturbation, and have closed forms: see `rules.head`.
"""

import operator
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deepzero_core.perturb.rewriting.nodes import replace_by

aten = torch.ops.aten


def linear_cross_entropy(
    bias: Tensor, inputs: Tensor, weight: Tensor, targets: Tensor, class_weight: Tensor | None, reduction: int,
    ignored: int,
) -> Tensor:  # fmt: skip
    """Cross-entropy of the scores x·W + c with classes t: x [B, C], W [C, K], c [K], t [B] → a scalar, or [B]."""
    scores = torch.addmm(bias, inputs, weight)
    loss: Tensor = aten.nll_loss_forward.default(scores.log_softmax(1), targets, class_weight, reduction, ignored)[0]
    return loss


def fuse_head(graph: GraphModule) -> None:
    """Put `linear_cross_entropy` where a graph of ATen operators computes it; scores that others read stay as well."""
    for node in list(graph.graph.nodes):
        if node.target is not aten.nll_loss_forward.default:
            continue
        logarithms, scores = node.args[0], cast(Node, node.args[0]).all_input_nodes[0]
        if logarithms.target is not aten._log_softmax.default or logarithms.args[1:] not in ((1, False), (-1, False)):
            continue
        if len(logarithms.users) > 1:  # other parts of the loss need them, too: label smoothing
            continue
        if scores.target is not aten.addmm.default or scores.kwargs:
            continue
        for unread in [result for result in node.users if not result.users]:  # the sum of the class weights
            graph.graph.erase_node(unread)
        results = list(node.users)
        if all(result.target is operator.getitem and result.args[1] == 0 for result in results):
            for result in results:
                replace_by(result, linear_cross_entropy, *scores.args, *node.args[1:])
