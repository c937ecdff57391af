"""What a selection leaves out is not computed: where only a part of a value is read, only that part is made.

A class token is the usual case: the head reads one of T tokens, so that the last encoder has to mix and transform one
row, and needs the other tokens as keys and values alone. The graph is read backwards once: where all who read a value
need the same part of it, and its operator makes a part of its result from parts of its operands, the operator is given
those. Any other value stays whole, and its readers cut what they need.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from operator import getitem
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from deepzero_core.perturb.rewriting.attention import attend
from deepzero_core.perturb.rewriting.feed_forward import feed_forward
from deepzero_core.perturb.rewriting.nodes import RESHAPES, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """One range of one axis, in words that outlast reshaping: of a value viewed as [before, length, behind], what is
    at [:, start : stop, :]."""

    before: int
    length: int
    behind: int
    start: int
    stop: int

    @classmethod
    def along(cls, axis: int, shape: torch.Size, start: int, stop: int) -> "Part":
        return cls(prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]), start, stop)

    def place(self, shape: torch.Size) -> tuple[int, int, int] | None:
        """(axis, outer, inner): the axis that holds [outer, length, inner]; None where the range lies across axes."""
        for axis, size in enumerate(shape):
            outer, left = divmod(self.before, max(1, prod(shape[:axis])))
            inner, right = divmod(self.behind, max(1, prod(shape[axis + 1 :])))
            if not left and not right and outer * self.length * inner == size:
                return axis, outer, inner
        return None

    def axis(self, shape: torch.Size) -> int | None:
        """The axis that the range is of, where nothing else lies on it."""
        found = self.place(shape)
        return found[0] if found is not None and found[1:] == (1, 1) else None

    def within(self, shape: torch.Size) -> list[int]:
        """The shape of the part of a value of this shape."""
        axis, outer, inner = cast(tuple[int, int, int], self.place(shape))
        return [*shape[:axis], outer * (self.stop - self.start) * inner, *shape[axis + 1 :]]


Needs = dict[int, Part]
"""By position of an operand, the part of it that is needed; others are needed whole."""
Operator = Callable[[Node, Part], Needs | None]
_operators: dict[Any, Operator] = {}


def narrow(graph: GraphModule) -> None:
    """Let a graph of ATen operators compute parts where it reads parts."""
    parts: dict[Node, Part] = {}
    needs: dict[Node, Needs] = {}
    for node in reversed(graph.graph.nodes):
        part = _read(node, needs)
        narrower = None if part is None else _needs(node, part)
        if part is not None and narrower is not None:
            parts[node], needs[node] = part, narrower
        elif (selected := _selected(node)) is not None:
            needs[node] = {0: selected}
    cuts: dict[tuple[Node, Part], Node] = {}
    for node in [node for node in graph.graph.nodes if node in needs]:
        operands = {i: cast(Node, node.args[i]) for i in needs[node]}
        if node in parts:
            for i, operand in operands.items():
                if operand not in parts:
                    node.update_arg(i, _cut(operand, needs[node][i], node, cuts))
            _resized(node, parts[node])
        elif operands[0] in parts:
            # The operand is what was to be selected.
            whole = (0,) if node.target is aten.select.int else (0, None)
            node.args = (operands[0], node.args[1] if len(node.args) > 1 else 0, *whole)


def _read(node: Node, needs: dict[Node, Needs]) -> Part | None:
    """The part of a value that all its readers need; None where that is all of it, or they need different ones."""
    found: set[Part | None] = set()
    for user in node.users:
        positions = [i for i, argument in enumerate(user.args) if argument is node]
        if user.target is not getitem or user.users:
            found |= {needs.get(user, {}).get(i) for i in positions} if positions else {None}
        if node in user.kwargs.values():
            return None
    return found.pop() if len(found) == 1 else None


def _selected(node: Node) -> Part | None:
    """What a selection takes of its operand; None where that is everything, or the node is none."""
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return None
    operand, axis, first, last, step = cast(Any, (*node.args, *(None,) * 5))[:5]
    shape = shape_of(operand)
    axis = (axis or 0) % len(shape)
    length = shape[axis]
    if node.target is aten.select.int:
        return Part.along(axis, shape, first % length, first % length + 1)
    start, stop, stride = slice(first, last, step).indices(length)
    return Part.along(axis, shape, start, stop) if stride == 1 and 0 < stop - start < length else None


def _cut(operand: Node, part: Part, reader: Node, cuts: dict[tuple[Node, Part], Node]) -> Node:
    """A part of a value that stays whole, cut before its first reader."""
    if (operand, part) not in cuts:
        shape, call = shape_of(operand), reader.graph.call_function
        axis, outer, inner = cast(tuple[int, int, int], part.place(shape))
        with reader.graph.inserting_before(reader):
            if (outer, inner) == (1, 1):
                cut = call(aten.slice.Tensor, (operand, axis, part.start, part.stop))
            else:
                apart = [*shape[:axis], outer, part.length, inner, *shape[axis + 1 :]]
                split = call(aten.reshape.default, (operand, apart))
                piece = call(aten.slice.Tensor, (split, axis + 1, part.start, part.stop))
                cut = call(aten.reshape.default, (piece, part.within(shape)))
        cuts[operand, part] = cut
    return cuts[operand, part]


def _resized(node: Node, part: Part) -> None:
    """Give an operator that is told the shape of its result that of the part."""
    if node.target in (*RESHAPES, aten.expand.default):
        node.args = (node.args[0], part.within(shape_of(node)))
    if node.target in RESHAPES:
        # A part may lie in memory as no view of this shape does.
        node.target = aten.reshape.default


# ---- By operator, the parts of the operands that a part of the result is made of.


def _needs(node: Node, part: Part) -> Needs | None:
    """None where the operator makes no part alone."""
    found = _operators.get(node.target)
    if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        found = _elementwise
    if found is None or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    needs = found(node, part)
    operands_fit = needs is not None and all(p.place(shape_of(cast(Node, node.args[i]))) for i, p in needs.items())
    return needs if operands_fit and part.place(shape_of(node)) else None


def _makes_parts(*targets: Any) -> Callable[[Operator], Operator]:
    def register(function: Operator) -> Operator:
        _operators.update(dict.fromkeys(targets, function))
        return function

    return register


@_makes_parts(*RESHAPES)
def _reshaped(node: Node, part: Part) -> Needs:
    return {0: part}


@_makes_parts(aten.clone.default, aten.expand.default)
def _elementwise(node: Node, part: Part) -> Needs | None:
    """Operands of the result's shape; others where the range is one of their axes, or they are repeated along it."""
    shape, needs = shape_of(node), {}
    for i, operand in enumerate(node.args):
        if isinstance(operand, Node):
            own, axis = shape_of(operand), part.axis(shape)
            if own == shape:
                needs[i] = part
                continue
            if axis is None:
                return None
            axis -= len(shape) - len(own)
            if axis >= 0 and own[axis] != 1:
                needs[i] = Part.along(axis, own, part.start, part.stop)
    return needs


@_makes_parts(getitem)
def _first_result(node: Node, part: Part) -> Needs | None:
    operator, index = cast(tuple[Node, int], node.args)
    return {0: part} if index == 0 and operator.target is aten.native_layer_norm.default else None


@_makes_parts(aten.native_layer_norm.default)
def _normalised(node: Node, part: Part) -> Needs | None:
    return {0: part} if part.behind % prod(cast(list[int], node.args[1])) == 0 else None


@_makes_parts(aten._softmax.default, aten._safe_softmax.default, aten._log_softmax.default)
def _along_another_axis(node: Node, part: Part) -> Needs | None:
    shape = shape_of(node)
    found = part.place(shape)
    return {0: part} if found is not None and found[0] != cast(int, node.args[1]) % len(shape) else None


@_makes_parts(aten.t.default, aten.transpose.int, aten.permute.default)
def _permuted(node: Node, part: Part) -> Needs | None:
    axis, operand = part.axis(shape_of(node)), cast(Node, node.args[0])
    if axis is None:
        return None
    shape = shape_of(operand)
    order = cast(Any, node.target)(torch.empty(*range(1, len(shape) + 1), device="meta"), *node.args[1:]).shape
    return {0: Part.along(order[axis] - 1, shape, part.start, part.stop)}


@_makes_parts(aten.mm.default, aten.bmm.default, aten.addmm.default)
def _rows(node: Node, part: Part) -> Needs | None:
    """Rows of a product are those of its first factor; what is added must be the same in all of them."""
    first = len(node.args) - 2
    shape = shape_of(node)
    found = part.place(shape)
    if found is None or found[0] != len(shape) - 2 or (first and len(shape_of(cast(Node, node.args[0]))) > 1):
        return None
    _, outer, inner = found
    factor = shape_of(cast(Node, node.args[first]))
    return {first: Part(prod(shape[:-2]) * outer, part.length, inner * factor[-1], part.start, part.stop)}


@_makes_parts(feed_forward)
def _fed_forward(node: Node, part: Part) -> Needs | None:
    found, inputs = part.place(shape_of(node)), shape_of(cast(Node, node.args[2]))
    if found is None or found[0] != 0:
        return None
    _, outer, inner = found
    return {2: Part(outer, part.length, inner * inputs[1], part.start, part.stop)}


@_makes_parts(attend)
def _attended(node: Node, part: Part) -> Needs | None:
    """Rows are those of the first factor; examples and heads those of all three."""
    axis = part.axis(shape_of(node))
    if axis is None or axis > 2:
        return None
    factors = range(1 if axis == 2 else 3)
    return {i: Part.along(axis, shape_of(node.args[i]), part.start, part.stop) for i in factors}
