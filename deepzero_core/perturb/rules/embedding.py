"""Look-ups, out[…, :] = W[indices[…], :].

W moves at (r, d) by s:   Δ[…, d] = s where indices = r, else 0      one column
"""

import torch

from deepzero_core.perturb.changes import Block, Change
from deepzero_core.perturb.rules.registry import Call, Result, only_one_hot, rule

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(call: Call) -> Result:
    change = only_one_hot(call, 0)
    if change is None:
        return None
    weight, indices = call.args[0], call.args[1]
    row, column = change.positions // weight.shape[1], change.positions % weight.shape[1]
    axes = [1] * indices.ndim
    met = indices.unsqueeze(0) == row.view(-1, *axes)
    delta = torch.where(met, change.steps.view(-1, *axes), 0)
    return Change(delta.unsqueeze(-1), Block(indices.ndim, tuple(column.tolist())))
