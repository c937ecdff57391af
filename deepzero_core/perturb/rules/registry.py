"""One rule per operator: from the bases and the changes of its operands to the change of its result.

A rule is a function `Call -> result | None`. It returns the change of the operator's output (a tuple of them where the
operator returns several tensors, None in a place that does not move), or None to decline, and then the general path
answers. Rules exist to be faster or more exact than the general path, never to be different from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepzero_core.perturb.changes import AnyChange, Change, OneHot, one_hot_block, take

T = TypeVar("T")
Result = AnyChange | tuple[AnyChange | None, ...] | None


@dataclass(frozen=True)
class Call:
    """An operator at work: its base operands, which of them change and how, and its base result.

    `changes` has the structure of `args`: None where an operand stays, a list where the operand is a list of tensors.
    `read` says which of several results the loss depends on: only their changes matter. `kept` holds what `once` made.
    `precision` says what operators linear in a change may round it to.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    changes: tuple[Any, ...]
    output: Any
    count: int
    read: frozenset[int] = frozenset()
    kept: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"

    def argument(self, position: int, default: Any = None) -> Any:
        return self.args[position] if position < len(self.args) else default

    def change(self, position: int) -> AnyChange | None:
        found: AnyChange | None = self.changes[position] if position < len(self.changes) else None
        return found

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """A function of the base values alone: computed for the first chunk of a base pass, kept for the others."""
        if name not in self.kept:
            self.kept[name] = compute()
        kept: T = self.kept[name]
        return kept

    def once_for_parameter(self, name: str, compute: Callable[[], T]) -> T:
        """As `once`, given up when another parameter's turn comes: for what only the parameter's own operator needs."""
        if name not in self.own:
            self.own[name] = compute()
        kept: T = self.own[name]
        return kept

    def on_block(self, change: Change, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """The part of `once(name, compute)`, of the changed operand's shape, that the change covers: see `take`."""
        return take(self.once(name, compute), change.block, change.width if change.block else 0)

    def finite(self) -> bool:
        """Whether the base result holds neither infinities nor NaN."""
        return self.once("finite", lambda: bool(self.output.isfinite().all()))

    def changed(self) -> tuple[int, ...]:
        """Positions of the operands that change; a list operand counts when any of its tensors does."""
        return tuple(
            i
            for i, change in enumerate(self.changes)
            if (any(c is not None for c in change) if isinstance(change, list) else change is not None)
        )


Rule = Callable[[Call], Result]
_rules: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the rule of one or more ATen overloads.

    Raises:
        ValueError: an overload has a rule already.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _rules:
                raise ValueError(f"{target} already has the rule {_rules[target].__name__}")
            _rules[target] = function
        return function

    return register


def find(target: Any) -> Rule | None:
    return _rules.get(target)


def only_change(call: Call, position: int = 0) -> Change | None:
    """The change of operand `position` when it is the only one that moves and is a plain change."""
    change = call.change(position)
    return change if call.changed() == (position,) and isinstance(change, Change) else None


def only_one_hot(call: Call, position: int) -> OneHot | None:
    """The one-hot change of operand `position` when it is the only one that moves."""
    change = call.change(position)
    return change if call.changed() == (position,) and isinstance(change, OneHot) else None


def plain_change(call: Call, position: int = 0) -> Change | None:
    """As `only_change`, where a one-hot change counts as a block of width 1."""
    change = only_one_hot(call, position)
    return one_hot_block(change, call.args[position].shape) if change else only_change(call, position)


LARGEST_EXPONENT = 30.0
"""Differences beyond it are not put into expm1, which overflows where the factor beside it vanishes."""


def within(delta: Tensor, limit: float) -> bool:
    """Whether every |δ| ≤ limit; never where a difference is NaN."""
    if not delta.numel():
        return True
    low, high = delta.aminmax()
    return bool((low >= -limit) & (high <= limit))


def over_perturbations(function: Callable[[Tensor], Tensor], delta: Tensor) -> Tensor:
    """Apply a function of one tensor to every perturbation: [P, …] -> [P, …]."""
    if delta.shape[0] == 1:
        return function(delta[0]).unsqueeze(0)
    result: Tensor = torch.vmap(function)(delta)
    return result
