"""Operators that consist of others, one after the other: where no form of their own holds."""

from dataclasses import replace
from typing import Any

from deepzero_core.perturb.rules.elementwise import rule_for
from deepzero_core.perturb.rules.general import general
from deepzero_core.perturb.rules.registry import Call


def change_of_part(
    call: Call, name: str, target: Any, args: tuple[Any, ...], kwargs: Any, changes: tuple[Any, ...], output: Any
) -> Any:
    """The change of one of the operators that this one consists of; None where it does not move."""
    if all(change is None for change in changes):
        return None
    kept: dict[str, Any] = call.once(f"kept by {name}", dict)
    part = replace(call, target=target, args=args, kwargs=kwargs, changes=changes, output=output, kept=kept, own={})
    found = rule_for(target)
    change = found(part) if found is not None else None
    return general(part) if change is None else change
