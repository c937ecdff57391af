"""What perturbations cost: floating-point operations and bytes, by stretch of the graph, and the time that they take.

    owner    the parameter's own operator
    thin     a block of channels or columns moves
    dense    everything moves

    seconds = operations / peak operations + bytes / peak bandwidth + starts · seconds per start

Operations are those of the direct formula: a convolution by Winograd's method counts as much as any other, so that
shares of the peak are comparable and may exceed 1. Bytes are those of the changes, read and written once per operator.
An operator is started once per chunk, however many coordinates that has: costs of one coordinate have no starts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Change, OneHot
from deepzero_core.perturb.machine import Machine
from deepzero_core.perturb.rewriting.attention import attend
from deepzero_core.perturb.rewriting.feed_forward import feed_forward
from deepzero_core.perturb.rewriting.head import linear_cross_entropy
from deepzero_core.perturb.rules.registry import Call

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes of memory traffic, and operators that are started."""

    flops: float = 0.0
    bytes: float = 0.0
    starts: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.starts + other.starts)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times, self.starts * times)

    def seconds(self, machine: Machine) -> float:
        """The time that the machine needs at its peaks, and to start operators."""
        return self.flops / machine.flops + self.bytes / machine.bandwidth + self.starts * machine.start


def total(costs: Mapping[str, Cost]) -> Cost:
    """The sum over stretches or parameters."""
    return sum(costs.values(), Cost())


def stretch(call: Call, result: Any) -> str:
    """Where on its way to the loss a change is: "owner", "thin" or "dense"."""
    if any(isinstance(call.change(position), OneHot) for position in call.changed()):
        return "owner"
    first = result[0] if isinstance(result, tuple) else result
    return "thin" if isinstance(first, Change) and first.block is not None else "dense"


def work(call: Call, result: Any) -> Cost:
    """The cost of one operator's change, for all of the call's perturbations."""
    first = result[0] if isinstance(result, tuple) else result
    if isinstance(first, OneHot) or not isinstance(first, Change):
        return Cost()
    elements = prod(_shape(first, call))
    operands = [call.change(position) for position in call.changed()]
    read = sum(change.delta.numel() for change in operands if isinstance(change, Change))
    size = _output(call).element_size()
    return Cost(float(elements * _operations(call)), float(size * (read + elements)))


def _operations(call: Call) -> int:
    """Floating-point operations per element of the result."""
    contracted = _CONTRACTED.get(call.target)
    if contracted is None or any(isinstance(call.change(position), OneHot) for position in call.changed()):
        return 2
    position, change = next(((i, c) for i, c in enumerate(call.changes) if isinstance(c, Change)), (0, None))
    axis, weight = contracted
    length: int = weight(call)
    if change is not None and change.block is not None and change.block.dim == axis:
        length = length // call.args[position].shape[axis] * change.width
    return 2 * length


def _kernel(call: Call) -> int:
    weight: Tensor = call.args[1]
    return prod(weight.shape[1:])


def _attended(call: Call) -> int:
    """Two products for a·b and two for p·v."""
    (inner, keys), features = call.args[1].shape[2:], call.args[2].shape[3]
    return int(2 * keys * (inner + features) // features)


def _fed_forward(call: Call) -> int:
    (inputs, hidden), outputs = call.args[1].shape, call.args[4].shape[1]
    return int(hidden * (inputs + outputs) // outputs)


def _scored(call: Call) -> int:
    """The scores behind one loss, or behind the mean of all."""
    return int(call.args[1].numel() * call.args[2].shape[1] // max(1, _output(call).numel()))


# By operator: the axis of its operand that is summed over, and how many products make one element of the result.
_CONTRACTED: dict[Any, Any] = {
    aten.convolution.default: (1, _kernel),
    aten.mm.default: (1, lambda call: call.args[0].shape[1]),
    aten.addmm.default: (1, lambda call: call.args[1].shape[1]),
    aten.bmm.default: (2, lambda call: call.args[0].shape[2]),
    feed_forward: (None, _fed_forward),
    attend: (None, _attended),
    linear_cross_entropy: (1, _scored),
}


def _output(call: Call) -> Tensor:
    output = call.output[0] if isinstance(call.output, (tuple, list)) else call.output
    assert isinstance(output, Tensor)
    return output


def _shape(change: Change, call: Call) -> list[int]:
    shape = [change.count, *_output(call).shape]
    if change.block is not None:
        shape[1 + change.block.dim] = change.width
    return shape
