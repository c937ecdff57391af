"""Whether torch.optim has an optimiser of that name, and whether it can be built and stepped with these arguments."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from deepzero_core.errors import suggest

# An estimated gradient is a dense tensor of any shape, and there is one per step.
_UNUSABLE = {
    "LBFGS": "it evaluates the loss again and again within a step, which an estimated gradient does not offer",
    "SparseAdam": "it takes gradients of torch's sparse tensor format only",
    "Muon": "it takes matrices only, and these networks have convolutions and biases",
    "Optimizer": "it is the base class of the others",
}


def problems(name: str, lr: float, arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong, as pairs (key below the optimizer's own, reason); empty when all is well.

    The ordinary cases of SGD are recognised without importing torch, which takes seconds; all else asks torch.
    """
    if _plain_sgd(name, lr, arguments):
        return []
    return list(_asked(name, lr, json.dumps(dict(arguments))))


def _plain_sgd(name: str, lr: float, arguments: Mapping[str, Any]) -> bool:
    numbers = {"momentum", "weight_decay"}
    return (
        name == "SGD"
        and _ordinary(lr)
        and set(arguments) <= {*numbers, "nesterov"}
        and all(_ordinary(arguments.get(key, 0)) for key in numbers)
        and (
            arguments.get("nesterov", False) is False
            or (arguments["nesterov"] is True and _positive_momentum(arguments))
        )
    )


def _positive_momentum(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get("momentum", 0) > 0)


def _ordinary(value: Any) -> bool:
    # The upper bound keeps far from what overflows float32.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e6


@functools.lru_cache(maxsize=64)
def _asked(name: str, lr: float, arguments_json: str) -> tuple[tuple[str, str], ...]:
    import torch

    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    usable = sorted(set(optimizers) - set(_UNUSABLE))
    if name in _UNUSABLE:
        return (("name", f"{name} cannot be used here: {_UNUSABLE[name]}; valid are: {', '.join(usable)}"),)
    if name not in optimizers:
        same = [key for key in usable if key.lower() == name.lower()]
        hint = f"did you mean {same[0]!r}?" if same else suggest(name, usable)
        return (("name", f"torch.optim has no optimizer {name!r}; {hint}"),)

    arguments: dict[str, Any] = json.loads(arguments_json)
    found = _argument_problems(name, optimizers[name], arguments)
    if found:
        return found
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    try:
        optimizers[name]([parameter], lr=lr, **arguments).step()
    except Exception as error:  # torch answers wrong arguments with exceptions of many kinds, assertions among them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return (("arguments", f"{name} refuses lr={lr} with {arguments}: {reason}"),)
    return ()


def _argument_problems(
    name: str, optimizer: Callable[..., object], arguments: Mapping[str, Any]
) -> tuple[tuple[str, str], ...]:
    accepted = [key for key in inspect.signature(optimizer).parameters if key not in ("params", "lr", "differentiable")]
    found = []
    for key in arguments:
        if key == "lr":
            found.append(("arguments.lr", "the learning rate is set by training.optimizer.lr"))
        elif key == "differentiable":
            found.append(
                ("arguments.differentiable", "the optimizer's own step is not differentiated here; leave it out")
            )
        elif key not in accepted:
            found.append(
                (
                    f"arguments.{key}",
                    f"{name} has no argument {key!r}; {suggest(key, accepted)} "
                    "(training.optimizer.arguments={} starts from its defaults)",
                )
            )
    return tuple(found)
