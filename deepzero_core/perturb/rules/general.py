"""The general path: `torch.vmap` of the operator over the perturbations. Right for every operator.

    Δf[p] = f(y₁ + δ₁[p], …) − f(y₁, …)

It has the semantics of P separate evaluations, whatever the operator does with its axes. Both values are taken in the
next wider type, where their difference keeps the digits of δ. Where torch has no batching rule for an operator it is
evaluated P times.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from deepzero_core.perturb.changes import AnyChange, Change, Replaced, difference, perturbed
from deepzero_core.perturb.rules.registry import Call, Result

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


def widened(value: Any) -> Any:
    """A tensor of floats in the next wider type, anything else as it is."""
    return value.to(_WIDER.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value


def _is_none(value: Any) -> bool:
    return value is None


def _flat(argument: Any, moved: Any) -> list[AnyChange | None]:
    """The changes of an argument, one for each of its leaves; a list that stays (a shape) has as many as numbers."""
    if moved is None:
        return [None] * len(tree_flatten(argument, is_leaf=_is_none)[0])
    return moved if isinstance(moved, list) else [moved]


def _moving(call: Call) -> dict[int, AnyChange]:
    """What changes, by position among the leaves of the arguments."""
    changes = [change for arg, moved in zip(call.args, call.changes, strict=True) for change in _flat(arg, moved)]
    return {i: change for i, change in enumerate(changes) if change is not None}


def operand_bytes(call: Call) -> int:
    """What `general` lays out: every operand that changes, whole and wide, once for each perturbation."""
    leaves, _ = tree_flatten(call.args, is_leaf=_is_none)
    total = 0
    for i in _moving(call):
        total += leaves[i].numel() * _WIDER.get(leaves[i].dtype, leaves[i].dtype).itemsize
    return call.count * total


def general(call: Call) -> Result:
    """The change of any operator's result."""
    base = call.once("wide", lambda: _wide_output(call))
    widen = widened if base is not None else (lambda value: value)
    bases, structure = tree_flatten((call.args, call.kwargs), is_leaf=_is_none)
    bases = [widen(leaf) for leaf in bases]
    moved = _moving(call)
    batched = [perturbed(bases[i], change).to(bases[i].dtype) for i, change in moved.items()]

    def evaluate(*operands: Tensor) -> Any:
        leaves = list(bases)
        for i, operand in zip(moved, operands, strict=True):
            leaves[i] = operand
        args, kwargs = tree_unflatten(leaves, structure)
        return _tensors(call.target(*args, **kwargs))

    outputs = _tensors(call.output)
    values = _evaluate_all(evaluate, batched, call.count)
    known = _tensors(call.output if base is None else base)
    changes = iter([_difference(*found) for found in zip(values, known, outputs, strict=True)])
    if isinstance(call.output, Tensor):
        return next(changes)
    return tuple(next(changes) if isinstance(part, Tensor) else None for part in call.output)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors among an operator's results."""
    return tuple(
        part for part in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(part, Tensor)
    )


def _wide_output(call: Call) -> Any:
    """The base result of the operator in the wider type; None where it has none: an operator may be of one type only,
    one from outside torch always is."""
    widest = all(leaf is widened(leaf) for leaf in tree_flatten((call.args, call.kwargs))[0])
    if widest or getattr(call.target, "namespace", "") != "aten":
        return None
    try:
        return call.target(*tree_map(widened, call.args), **tree_map(widened, call.kwargs))
    except RuntimeError:
        return None


def _evaluate_all(evaluate: Callable[..., tuple[Tensor, ...]], batched: list[Tensor], count: int) -> tuple[Tensor, ...]:
    try:
        with quiet_fallback():
            values: tuple[Tensor, ...] = torch.vmap(evaluate)(*batched)
            return values
    except RuntimeError:
        # vmap says in this way that it cannot batch an operator; a true failure of the operator comes again here.
        results = [evaluate(*(operand[p] for operand in batched)) for p in range(count)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


@contextmanager
def quiet_fallback() -> Iterator[None]:
    """Without torch's line on stderr, at every call, that it loops over an operator that it cannot batch."""
    show: Callable[[bool], None] = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]  # not in torch's stubs
    show(False)
    try:
        yield
    finally:
        show(True)


def _difference(value: Tensor, base: Tensor, output: Tensor) -> AnyChange:
    return Change(difference(value, base).to(output.dtype)) if base.is_floating_point() else Replaced(value)
