"""From ATen operators to the steps of a program: one function per operator.

A lowering notes the node's change in `draft.formulas`, and raises `UnsupportedError` where the program has no such
operator; the node then stays outside. All formulas are those of the rules of the same operators.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from deepzero_core.perturb.native import program
from deepzero_core.perturb.regions.draft import (
    Draft,
    Formula,
    Space,
    Statistics,
    UnsupportedError,
    arguments,
    as_float,
    space_of,
    window,
)

aten = torch.ops.aten
Lowering = Callable[[Draft, Node], Formula]

_WINOGRAD_CHANNELS = 12
"""From so many input channels on, Winograd's fewer products are faster than direct ones."""
_WINOGRAD_SPACE = 4
"""A smaller result would leave most of a tile unused."""

_lowerings: dict[Any, Lowering] = {}


def lowers(*targets: Any) -> Callable[[Lowering], Lowering]:
    """Register the lowering of one or more operators."""

    def register(function: Lowering) -> Lowering:
        for target in targets:
            assert target not in _lowerings, target
            _lowerings[target] = function
        return function

    return register


def lower(draft: Draft, node: Node) -> None:
    """Take a node into the region.

    Raises:
        UnsupportedError: the program has no such operator.
    """
    found = _lowerings.get(node.target)
    if found is None:
        raise UnsupportedError(node.target)
    draft.formulas[node] = found(draft, node)


def _require(condition: bool) -> None:
    if not condition:
        raise UnsupportedError


def _moving(draft: Draft, node: Node) -> list[int]:
    """Positions of the operands that change."""
    return [i for i, operand in enumerate(node.args) if isinstance(operand, Node) and operand in draft.formulas]


def _only_first(draft: Draft, node: Node) -> Node:
    _require(_moving(draft, node) == [0])
    first: Node = arguments(node)[0]
    return first


def _base(draft: Draft, argument: Any) -> Any:
    """An argument's base value."""
    return draft.values[argument] if isinstance(argument, Node) else argument


@lowers(aten.clone.default, aten.alias.default, aten.detach.default)
def _same(draft: Draft, node: Node) -> Formula:
    return draft.formulas[_only_first(draft, node)]


@lowers(operator.getitem)
def _item(draft: Draft, node: Node) -> Formula:
    _require(arguments(node)[1] == 0)
    return draft.formulas[_only_first(draft, node)]


@lowers(aten.convolution.default)
def _convolution(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    _, kernel, _, stride, padding, dilation, turned, _, groups = arguments(node)
    weight, outputs = draft.values[kernel], draft.values.like(node)
    _require(not turned and weight.ndim == outputs.ndim and program.suits(outputs))
    at = draft.closed(source)
    space = draft.spaces[at]
    target = space_of(outputs.shape)
    shape = window(space, target, weight.shape[2:], stride, padding, dilation, groups)
    if space.thin and groups == space.channels == target.channels:
        target = replace(target, thin=True, shift=space.shift)
    buffer = draft.buffer(target)
    plain: bool = (tuple(weight.shape[2:]), tuple(stride), tuple(dilation)) == ((3, 3), (1, 1), (1, 1))
    tiled = plain and groups == 1 and min(outputs.shape[2:]) >= _WINOGRAD_SPACE
    if tiled and not space.thin and space.channels >= _WINOGRAD_CHANNELS:
        kind = draft.winograd if space.channels % 2 == 0 else program.WINOGRAD
        packed = draft.once((kind, id(weight)), weight, lambda: program.pack_winograd(weight, kind))
    else:
        kind = program.CONVOLVE
        packed = draft.once(("packed", id(weight)), weight, lambda: program.pack(weight, groups))
    draft.step(
        kind, source=at, target=buffer, shape=shape, weight=packed, groups=groups, group_channels=weight.shape[1]
    )
    return Formula(buffer)


@lowers(aten.native_batch_norm.default)
def _batch_norm(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    _require(draft.read[node] <= {0})
    gamma, mean, scale = norm_of(draft, node)
    _require(program.suits(draft.values.like(source)))
    at = draft.closed(source)
    if not node.args[5]:
        return Formula(at, scale=scale if gamma is None else scale * gamma)
    beta = as_float(_base(draft, node.args[2]))
    draft.norms.append(Statistics(at, draft.values.sliced(source), mean, scale, gamma, beta))
    norm = len(draft.norms) - 1
    draft.step(program.MOMENTS, source=at, norm=norm)
    return Formula(at, norm=norm)


def norm_of(draft: Draft, node: Node) -> tuple[Any, Any, Any]:
    """Of a normalisation, by channel: γ, the mean and (v + ε)^−½ of its operand."""
    gamma, _, mean, variance, training, _, epsilon = (_base(draft, argument) for argument in arguments(node)[1:])
    if training:
        mean, scale = draft.values[node][1:]
    else:
        scale = (variance + epsilon).rsqrt()
    return as_float(gamma), as_float(mean), as_float(scale)


@lowers(aten.relu.default, aten.leaky_relu.default)
def _relu(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    slope = 0.0
    if node.target is aten.leaky_relu.default:
        _, slope = (*arguments(node), 0.01)[:2]
    formula = draft.formulas[source]
    if formula.slope is not None:
        formula = Formula(draft.closed(source))
    return replace(formula, base=_base_of(draft, formula, source), slope=slope)


_FUNCTIONS: dict[Any, int] = {
    aten.sigmoid.default: program.SIGMOID,
    aten.tanh.default: program.TANH,
    aten.silu.default: program.SILU,
    aten.gelu.default: program.GELU,
    aten.elu.default: program.ELU,
    aten.hardtanh.default: program.CLAMP,
    aten.hardsigmoid.default: program.HARD_SIGMOID,
    aten.hardswish.default: program.HARD_SWISH,
}


@lowers(*_FUNCTIONS)
def _activation(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    function, parameters = _FUNCTIONS[node.target], [*arguments(node)[1:]]
    if function == program.GELU and node.kwargs.get("approximate", "none") == "tanh":
        function = program.GELU_TANH
    elif function == program.ELU:
        parameters += [1.0] * (3 - len(parameters))
    elif function == program.CLAMP:
        parameters += [-1.0, 1.0][len(parameters) :]
    formula = draft.formulas[source]
    base, norm = _base_of(draft, formula, source), formula.norm if formula.normalised else program.NONE
    at = draft.closed(source)
    target = draft.buffer(draft.spaces[at])
    draft.step(
        program.ACTIVATE, source=at, target=target, norm=norm, base=base, function=function, parameters=parameters
    )
    return Formula(target)


def _base_of(draft: Draft, formula: Formula, operand: Node) -> Tensor | None:
    """The base values of an operand, in slices; None where its formula knows them."""
    return None if formula.normalised else draft.values.sliced(operand)


@lowers(aten.add.Tensor)
def _sum(draft: Draft, node: Node) -> Formula:
    _require(not node.kwargs)
    operands: list[Node] = [arguments(node)[i] for i in _moving(draft, node)]
    _require(all(draft.values.like(operand).shape == draft.values.like(node).shape for operand in operands))
    if len(operands) == 1:
        return replace(draft.formulas[operands[0]], displaced=True)
    first, second = operands
    _require(first is not second)
    spaces = [draft.space_of(draft.formulas[operand]) for operand in operands]
    if spaces[0].thin and spaces[1].thin:
        _require(spaces[0].shift == spaces[1].shift)
    for operand in operands:
        if not draft.formulas[operand].takes_terms:
            draft.closed(operand)
    # The one that takes the other in: all channels rather than one, a formula rather than numbers.
    hosts = sorted(operands, key=lambda o: (draft.space_of(draft.formulas[o]).thin, draft.formulas[o].plain))
    return replace(draft.formulas[hosts[0]], residual=draft.closed(hosts[1]))


@lowers(aten.sub.Tensor)
def _less_what_stays(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    _require(draft.values.like(source).shape == draft.values.like(node).shape)
    return replace(draft.formulas[source], displaced=True)


@lowers(aten.max_pool2d_with_indices.default)
def _max_pool(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    _require(draft.read[node] <= {0} and len(draft.values.like(source).shape) == 4)
    _, kernel, *rest = arguments(node)
    given = [*rest, *[None] * 3][:3]
    stride, padding, dilation = (part or default for part, default in zip(given, (kernel, [0], [1]), strict=True))
    formula = draft.formulas[source]
    if formula.slope is None:
        formula = replace(formula, base=_base_of(draft, formula, source))
    space, outputs = draft.space_of(formula), draft.values.like(node)
    kernel, stride, padding, dilation = ([*part] * (3 - len(part)) for part in (kernel, stride, padding, dilation))
    shape = window(space, space_of(outputs.shape), kernel, stride, padding, dilation)
    return Formula(draft.pooled(formula, shape))


@lowers(aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def _average_pool(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    sides, outputs = draft.values.like(source).shape[2:], draft.values.like(node).shape
    _require(len(outputs) == 4)
    if node.target is aten._adaptive_avg_pool2d.default:
        _require(all(side % out == 0 for side, out in zip(sides, outputs[2:], strict=True)))
        kernel = stride = [side // out for side, out in zip(sides, outputs[2:], strict=True)]
        padding = [0, 0]
    else:
        given = arguments(node)[1:]
        kernel, stride, padding, beyond, padded, divisor = given + ([], [0, 0], False, True, None)[len(given) - 1 :]
        _require(not beyond and divisor is None and (padded or not any(padding)))
        kernel, stride, padding = ([*part] * (3 - len(part)) for part in (kernel, stride or kernel, padding))
    at = draft.closed(source)
    space = draft.spaces[at]
    shape = window(space, space_of(outputs), kernel, stride, padding, [1, 1])
    target = draft.buffer(replace(space, height=shape.out_height, width=shape.out_width))
    draft.step(program.AVERAGE, source=at, target=target, shape=shape)
    return Formula(target)


@lowers(aten.mean.dim)
def _mean(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    rank = len(draft.values.like(source).shape)
    _require(sorted(axis % rank for axis in arguments(node)[1]) == list(range(2, rank)) and not node.kwargs)
    at = draft.closed(source)
    target = draft.buffer(replace(draft.spaces[at], height=1, width=1))
    draft.step(program.MEAN, source=at, target=target)
    return Formula(target)


@lowers(aten.slice.Tensor)
def _slice(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    shape = draft.values.like(source).shape
    given = arguments(node)[1:]
    filled: tuple[Any, ...] = given + (0, 0, None, 1)[len(given) :]
    dim, start, end, step = filled
    axis = dim % len(shape)
    first_kept, _, step = slice(start, end, step).indices(shape[axis])
    if draft.values.like(node).shape == shape:
        return draft.formulas[source]
    _require(axis >= 2)
    stride, first = [1] * (len(shape) - 2), [0] * (len(shape) - 2)
    stride[axis - 2], first[axis - 2] = step, -first_kept
    return _placed(draft, node, source, stride, first, 0)


@lowers(aten.constant_pad_nd.default)
def _pad(draft: Draft, node: Node) -> Formula:
    source = _only_first(draft, node)
    rank = len(draft.values.like(source).shape)
    amounts = [*arguments(node)[1], *[0] * (2 * rank)][: 2 * rank]
    before = amounts[::2][::-1]  # by axis
    channels = amounts[2 * (rank - 2) : 2 * (rank - 1)]
    _require(amounts[2 * (rank - 1) :] == [0, 0] and min(channels) >= 0)
    return _placed(draft, node, source, [1] * (rank - 2), before[2:], before[1])


def _placed(draft: Draft, node: Node, source: Node, stride: list[int], first: list[int], front: int) -> Formula:
    """out[c, h] = in[c − front, h·stride − first], 0 outside."""
    at = draft.closed(source)
    space, outputs = draft.spaces[at], space_of(draft.values.like(node).shape)
    target: Space = replace(outputs, thin=space.thin, shift=space.shift + front if space.thin else 0)
    ones = [1] * len(stride)
    shape = window(space, outputs, ones, stride, first, ones)
    buffer = draft.buffer(target)
    draft.step(program.PLACE, source=at, target=buffer, shape=shape, front=0 if space.thin else front)
    return Formula(buffer)
