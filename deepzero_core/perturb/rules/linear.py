"""Matrix products, out = a·b (+ bias): linear layers and attention. Blocks of examples, rows and columns stay blocks.

b moves at (k, n) by s:   Δ[:, n] = s·a[:, k]         one column
a moves at (m, k) by s:   Δ[m, :] = s·b[k, :]         one row
a moves by δ:             Δ = δ·b                     only the rows of b that meet a block of columns
b moves by δ:             Δ = a·δ
both:                     Δ = δa·b + a·δb + δa·δb
bias moves by δ:          Δ = δ, in every row
"""

from dataclasses import replace

import torch
from torch import Tensor

from deepzero_core.perturb.changes import AnyChange, Block, Change, OneHot, dense, one_hot_block, take
from deepzero_core.perturb.rules.elementwise import sum_of_two
from deepzero_core.perturb.rules.registry import Call, Result, rule

aten = torch.ops.aten

_SHORT = 32
"""Products over fewer elements are bound by memory: one of twice the length is faster than two."""


@rule(aten.mm.default, aten.bmm.default)
def matrix_product(call: Call) -> Result:
    """[M, K]·[K, L], or N of them."""
    return _product(call.args[0], call.args[1], call.change(0), call.change(1), call.precision)


@rule(aten.addmm.default, aten.baddbmm.default)
def product_and_sum(call: Call) -> Result:
    """β·bias + α·a·b."""
    added, product = call.change(0), None
    if call.changed() != (0,):
        found = _product(call.args[1], call.args[2], call.change(1), call.change(2), call.precision)
        if found is None:
            return None
        product = _scaled(found, call.kwargs.get("alpha", 1))
    if added is None:
        return product
    if not isinstance(added, (OneHot, Change)):
        return None
    operands, changes = (call.args[0], call.output), (_scaled(added, call.kwargs.get("beta", 1)), product)
    return sum_of_two(replace(call, target=aten.add.Tensor, args=operands, kwargs={}, changes=changes))


@rule(aten.mv.default, aten.dot.default)
def vector_product(call: Call) -> Result:
    """[M, K]·[K] and [K]·[K], as products of matrices with one column or row."""
    (a, b), (change_a, change_b) = call.args, (call.change(0), call.change(1))
    if isinstance(change_b, Change):
        change_b = Change(change_b.delta.unsqueeze(2), change_b.block)
    if a.ndim == 1:
        a = a.unsqueeze(0)
        if isinstance(change_a, Change):
            block = change_a.block and replace(change_a.block, dim=1)
            change_a = Change(change_a.delta.unsqueeze(1), block)
    product = _product(a, b.unsqueeze(1), change_a, change_b, call.precision)
    if product is None:
        return None
    rows = product.block if product.block and product.block.dim == 0 and call.output.ndim else None
    return Change(product.delta.flatten(1) if call.output.ndim else product.delta.flatten(), rows)


def _scaled(change: OneHot | Change, factor: float) -> OneHot | Change:
    if factor == 1:
        return change
    if isinstance(change, OneHot):
        return OneHot(change.positions, factor * change.steps)
    return Change(factor * change.delta, change.block)


def _product(
    a: Tensor, b: Tensor, change_a: AnyChange | None, change_b: AnyChange | None, precision: str
) -> Change | None:
    """Δ(a·b) of matrices [M, K]·[K, L] or [N, M, K]·[N, K, L]."""
    if change_a is not None and change_b is not None:
        if not isinstance(change_a, (Change, OneHot)) or not isinstance(change_b, (Change, OneHot)):
            return None
        da, db = dense(change_a, a.shape), dense(change_b, b.shape)
        return Change(_both(a, b, da, db))
    if change_a is not None:
        return _left(a, b, change_a, precision)
    # aᵀ and bᵀ swap roles: (a·b)ᵀ = bᵀ·aᵀ.
    transposed = _left(b.mT, a.mT, _transpose(change_b, b.shape), precision) if change_b is not None else None
    return None if transposed is None else _swapped(transposed)


def _both(a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
    """δa·b + (a + δa)·δb; a short sum (the width of an attention head) as one product [δa, a + δa]·[b; δb]."""
    if a.shape[-1] <= _SHORT:
        return torch.matmul(torch.cat([da, a + da], -1), torch.cat([b.expand_as(db), db], -2))
    rows, columns = da.shape[-2:], db.shape[-2:]
    product = torch.baddbmm(
        torch.matmul(da, b).reshape(-1, rows[0], columns[1]), (a + da).reshape(-1, *rows), db.reshape(-1, *columns)
    )
    return product.view(*da.shape[:-1], columns[1])


def _matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """a·b; by a single matrix in bfloat16 where that is allowed. Many small products are not faster in it."""
    if precision == "bfloat16" and b.ndim == 2:
        return torch.matmul(a.bfloat16(), b.bfloat16()).to(a.dtype)
    return torch.matmul(a, b)


def _transpose(change: AnyChange, shape: torch.Size) -> AnyChange:
    if isinstance(change, OneHot):
        if len(shape) > 2:
            return _swapped(one_hot_block(change, shape))
        rows, columns = shape
        position = change.positions % columns * rows + change.positions // columns
        return OneHot(position, change.steps)
    return _swapped(change) if isinstance(change, Change) else change


def _swapped(change: Change) -> Change:
    """The change of the transposed matrix."""
    rank = change.delta.ndim - 1
    places = {rank - 2: rank - 1, rank - 1: rank - 2}
    block = change.block and replace(change.block, dim=places.get(change.block.dim, change.block.dim))
    return Change(change.delta.mT, block)


def _left(a: Tensor, b: Tensor, change: AnyChange, precision: str) -> Change | None:
    """Δ(a·b) when a [(N,) M, K] changes and b [(N,) K, L] stays."""
    if isinstance(change, OneHot):
        if a.ndim > 2:
            return _left(a, b, one_hot_block(change, a.shape), precision)
        row, column = change.positions // a.shape[1], change.positions % a.shape[1]
        delta = change.steps[:, None] * b[column]
        return Change(delta.unsqueeze(1), Block(0, tuple(row.tolist())))
    if not isinstance(change, Change):
        return None
    if b.ndim > 2 and b.shape[0] and b.stride(0) == 0:
        # One matrix for all N: the product runs over all rows at once.
        b = b[0]
    block = change.block
    if block is not None and block.dim == a.ndim - 1:
        met = take(b, Block(b.ndim - 2, block.start), change.width)
        met = met.squeeze(0) if met.shape[0] == 1 else met.view(-1, *[1] * (a.ndim - b.ndim), *met.shape[1:])
        return Change(torch.matmul(change.delta, met))
    if block is not None and block.dim < b.ndim - 2:
        b = take(b, block, change.width)
    return Change(_matmul(change.delta, b, precision), block)
