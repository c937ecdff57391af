"""Matrix products, out = a·b (+ bias): linear layers and attention.

b moves at (k, n) by s:   Δ[:, n] = s·a[:, k]         one column
a moves at (m, k) by s:   Δ[m, :] = s·b[k, :]         one row
a moves by δ:             Δ = δ·b                     only the rows of b that meet a block of columns
b moves by δ:             Δ = a·δ
both:                     Δ = δa·b + a·δb + δa·δb
bias moves at n by s:     Δ[…, n] = s
"""

from dataclasses import replace

import torch
from torch import Tensor

from deepzero_core.perturb.changes import AnyChange, Block, Change, OneHot, dense, one_hot_block, take
from deepzero_core.perturb.rules.registry import Call, Result, only_one_hot, rule

aten = torch.ops.aten


@rule(aten.mm.default)
def mm(call: Call) -> Result:
    return _product(call.args[0], call.args[1], call.change(0), call.change(1))


@rule(aten.addmm.default)
def addmm(call: Call) -> Result:
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    if 0 not in call.changed():
        product = _product(call.args[1], call.args[2], call.change(1), call.change(2))
        return replace(product, delta=alpha * product.delta) if product and alpha != 1 else product
    bias = only_one_hot(call, 0)
    if bias is None:
        return None
    change = one_hot_block(bias, call.args[0].shape)
    assert change.block is not None
    rows, columns = call.output.shape
    on_columns = call.args[0].shape[-1:] == (columns,) and change.block.dim == call.args[0].ndim - 1
    if not on_columns or call.args[0].numel() != columns:
        return None
    return Change(beta * change.delta.reshape(-1, 1, 1).expand(-1, rows, 1), Block(1, change.block.start))


@rule(aten.bmm.default)
def bmm(call: Call) -> Result:
    """[N, M, K]·[N, K, L]; blocks along the batch axis stay blocks."""
    a, b = call.args
    changes = [call.change(0), call.change(1)]
    if any(not isinstance(change, (Change, OneHot)) for change in changes if change is not None):
        return None
    if len(call.changed()) == 1:
        (position,) = call.changed()
        change = changes[position]
        if isinstance(change, Change) and change.block and change.block.dim == 0:
            other = take(call.args[1 - position], change.block, change.width)
            product = change.delta @ other if position == 0 else other @ change.delta
            return Change(product, change.block)
    da = dense(changes[0], a.shape) if isinstance(changes[0], (Change, OneHot)) else None
    db = dense(changes[1], b.shape) if isinstance(changes[1], (Change, OneHot)) else None
    if db is None:
        assert da is not None
        return Change(torch.matmul(da, b))
    if da is None:
        return Change(torch.matmul(a, db))
    return Change(torch.matmul(da, b) + torch.matmul(a + da, db))


def _product(a: Tensor, b: Tensor, change_a: AnyChange | None, change_b: AnyChange | None) -> Change | None:
    if change_a is not None and change_b is not None:
        if not isinstance(change_a, (Change, OneHot)) or not isinstance(change_b, (Change, OneHot)):
            return None
        da, db = dense(change_a, a.shape), dense(change_b, b.shape)
        return Change(torch.matmul(da, b) + torch.matmul(a + da, db))
    if change_a is not None:
        return _left(a, b, change_a)
    # aᵀ and bᵀ swap roles: (a·b)ᵀ = bᵀ·aᵀ.
    transposed = _left(b.t(), a.t(), _transpose(change_b, b.shape)) if change_b is not None else None
    if transposed is None:
        return None
    block = transposed.block and replace(transposed.block, dim=1 - transposed.block.dim)
    return Change(transposed.delta.transpose(1, 2), block)


def _transpose(change: AnyChange, shape: torch.Size) -> AnyChange:
    if isinstance(change, OneHot):
        rows, columns = shape
        position = change.positions % columns * rows + change.positions // columns
        return OneHot(position, change.steps)
    if isinstance(change, Change):
        block = change.block and replace(change.block, dim=1 - change.block.dim)
        return Change(change.delta.transpose(1, 2), block)
    return change


def _left(a: Tensor, b: Tensor, change: AnyChange) -> Change | None:
    """Δ(a·b) when a [M, K] changes and b [K, N] stays."""
    if isinstance(change, OneHot):
        row, column = change.positions // a.shape[1], change.positions % a.shape[1]
        delta = change.steps[:, None] * b[column]
        return Change(delta.unsqueeze(1), Block(0, tuple(row.tolist())))
    if not isinstance(change, Change):
        return None
    block = change.block
    if block is not None and block.dim == 1:
        rows = take(b, Block(0, block.start), change.width)
        return Change(torch.matmul(change.delta, rows.squeeze(0) if rows.shape[0] == 1 else rows))
    return Change(torch.matmul(change.delta, b), block)
