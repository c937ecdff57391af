"""The general path: `torch.vmap` of the operator over the perturbations. Right for every operator.

    Δf[p] = f(y₁ + δ₁[p], …) − f(y₁, …)

It has the semantics of P separate evaluations, whatever the operator does with its axes. Where torch has no batching
rule for an operator it is evaluated P times.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from deepzero_core.perturb.changes import AnyChange, Change, Replaced, difference, perturbed
from deepzero_core.perturb.rules.registry import Call, Result


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
    """What `general` lays out: every operand that changes, whole, once for each perturbation."""
    leaves, _ = tree_flatten(call.args, is_leaf=_is_none)
    total: int = sum(leaves[i].numel() * leaves[i].element_size() for i in _moving(call))
    return call.count * total


def general(call: Call) -> Result:
    """The change of any operator's result."""
    bases, structure = tree_flatten((call.args, call.kwargs), is_leaf=_is_none)
    moved = _moving(call)
    batched = [perturbed(bases[i], change) for i, change in moved.items()]

    def evaluate(*operands: Tensor) -> Any:
        leaves = list(bases)
        for i, operand in zip(moved, operands, strict=True):
            leaves[i] = operand
        args, kwargs = tree_unflatten(leaves, structure)
        return call.target(*args, **kwargs)

    values = _evaluate_all(evaluate, batched, call.count)
    if isinstance(call.output, Tensor):
        return _difference(values, call.output)
    return tuple(
        _difference(value, base) if isinstance(base, Tensor) else None
        for value, base in zip(values, call.output, strict=True)
    )


def _evaluate_all(evaluate: Callable[..., Any], batched: list[Tensor], count: int) -> Any:
    try:
        with _quiet_fallback():
            return torch.vmap(evaluate)(*batched)
    except RuntimeError:
        # vmap says in this way that it cannot batch an operator; a true failure of the operator comes again here.
        results = [evaluate(*(operand[p] for operand in batched)) for p in range(count)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(parts) if isinstance(parts[0], Tensor) else None for parts in zip(*results, strict=True))


@contextmanager
def _quiet_fallback() -> Iterator[None]:
    """Without torch's line on stderr, at every call, that it loops over an operator that it cannot batch."""
    show: Callable[[bool], None] = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]  # not in torch's stubs
    show(False)
    try:
        yield
    finally:
        show(True)


def _difference(value: Tensor, base: Tensor) -> AnyChange:
    return Change(difference(value, base)) if base.is_floating_point() else Replaced(value)
