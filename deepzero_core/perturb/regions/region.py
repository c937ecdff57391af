"""A region: from one change that enters it to the changes that leave it, in one call of the kernels.

A region begins at a convolution or a BatchNorm and goes on through everything downstream that the program has an
operator for. What it does not know is left to the rules; behind that, another region may begin.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from deepzero_core.perturb.base_values import BaseValues
from deepzero_core.perturb.changes import AnyChange, Block, Change, OneHot, dense
from deepzero_core.perturb.cost import Cost
from deepzero_core.perturb.native import gain, program
from deepzero_core.perturb.native.program import NONE, Program
from deepzero_core.perturb.regions.draft import Draft, Formula, UnsupportedError, arguments, space_of, window
from deepzero_core.perturb.regions.layout import lay_out
from deepzero_core.perturb.regions.lowering import lower, norm_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Entry:
    """What enters at which node: a parameter of its operator, one channel of its operand, or all of them."""

    node: Node
    position: int
    thin: bool

    @property
    def operand(self) -> Node:
        found = self.node.args[self.position]
        assert isinstance(found, Node)
        return found


@dataclass(frozen=True)
class Exit:
    """A change that leaves: its node, the shape of its base value, and what the program calls it."""

    node: Node
    shape: torch.Size
    external: int
    channels: int
    positions: int
    shift: int | None
    """Where one channel leaves: its distance from the one that entered."""


@dataclass(frozen=True)
class Region:
    """A program, and what it stands for in the graph."""

    entry: Entry
    nodes: frozenset[Node]
    exits: Sequence[Exit]
    program: Program
    costs: Mapping[str, Cost]
    """Of one perturbation, by stretch."""
    weight: torch.Size | None
    """Of a perturbed convolution weight, whose channels are in `groups` groups."""
    groups: int
    shape: torch.Size
    """Of the operand that enters."""

    @property
    def bytes(self) -> int:
        """Of what enters and leaves with one perturbation."""
        slices, entering = self.program.slices, 0 if self.entry.position else self.shape[1:].numel()
        leaving = sum(exit_.channels * exit_.positions for exit_ in self.exits)
        return 8 * slices * program.lanes() * (entering + leaving)

    def run(self, change: AnyChange) -> dict[Node, Change]:
        """The changes of the exits, from that of the entry's operand."""
        moved, steps = self._moved(change)
        count, slices, lanes = len(moved), self.program.slices, program.lanes()
        external = []
        if isinstance(change, Change):
            delta = change.delta if self.entry.thin else dense(change, self.shape)
            external.append(program.in_slices(delta, 1))
        external += [torch.empty(count, slices, e.channels, e.positions, lanes) for e in self.exits]
        self.program.run(moved, steps, external)
        found = {}
        for leaving in self.exits:
            delta = program.from_slices(external[leaving.external], self.program.batch, 1)
            shape = list(leaving.shape)
            shape[1] = leaving.channels
            block = None
            if leaving.shift is not None:
                block = Block(1, tuple((moved[:, 0] + leaving.shift).tolist()))
            found[leaving.node] = Change(delta.reshape(count, *shape), block)
        return found

    def _moved(self, change: AnyChange) -> tuple[Tensor, Tensor]:
        """Which element moves, [P, 4], and by how much, [P]."""
        if isinstance(change, OneHot):
            moved = torch.zeros(len(change.positions), 4, dtype=torch.int64)
            if self.weight is None:
                moved[:, 0] = change.positions
            else:
                out_channel, in_channel, *tap = torch.unravel_index(change.positions, self.weight)
                group = out_channel // (self.weight[0] // self.groups)
                moved[:, 0], moved[:, 1] = out_channel, group * self.weight[1] + in_channel
                moved[:, 4 - len(tap) :] = torch.stack(tap, 1)
            return moved, change.steps.contiguous()
        assert isinstance(change, Change)
        moved = torch.zeros(change.count, 4, dtype=torch.int64)
        if self.entry.thin:
            assert change.block is not None
            moved[:, 0] = torch.tensor(change.block.start)
        return moved, torch.zeros(change.count)


def entry_of(node: Node, changes: Mapping[Node, Any]) -> Entry | None:
    """How a region would be entered at this node; None where none begins."""
    if node.target not in (aten.convolution.default, aten.native_batch_norm.default):
        return None
    moving = [
        (position, changes[operand])
        for position, operand in enumerate(node.args)
        if isinstance(operand, Node) and changes.get(operand) is not None
    ]
    if len(moving) != 1:
        return None
    ((position, change),) = moving
    if position in (1, 2):
        return Entry(node, position, True) if isinstance(change, OneHot) else None
    if position != 0 or not isinstance(change, Change):
        return None
    return Entry(node, 0, change.block is not None and change.block.dim == 1 and change.width == 1)


def plan(
    entry: Entry,
    changed: Sequence[Node],
    needed: frozenset[Node],
    read: Mapping[Node, frozenset[int]],
    values: BaseValues,
    packed: dict[Any, Tensor],
    bfloat16: bool,
) -> Region | None:
    """The region that begins at an entry; None where the kernels have no such operator.

    Args:
        changed: the parameter and what changes with it, in order.
        needed: what the loss depends on.
        read: by operator with several results, which of them are read.
        values: base values by node.
        packed: see `Draft`.
        bfloat16: whether products may be rounded.
    """
    inputs = values.like(arguments(entry.node)[0])
    if not program.suits(inputs):
        return None
    winograd = _rounded(entry, changed) if bfloat16 and gain.bfloat16_pays() else program.WINOGRAD
    draft = Draft(values, read, packed, winograd, len(inputs))
    external: dict[int, int] = {}
    try:
        if entry.position:
            draft.formulas[entry.node] = _parameter_moved(draft, entry)
        else:
            buffer = draft.buffer(space_of(inputs.shape, entry.thin))
            external[buffer] = 0
            draft.formulas[entry.operand] = Formula(buffer)
            lower(draft, entry.node)
    except UnsupportedError:
        return None
    nodes = {entry.node, *_lowered(draft, entry, changed)}
    exits = [_exit(draft, node, external) for node in changed if node in nodes and _leaves(node, nodes, needed)]
    weight, groups = None, 1
    if entry.position == 1 and entry.node.target is aten.convolution.default:
        weight, groups = values[entry.operand].shape, arguments(entry.node)[8]
    laid_out, costs = lay_out(draft, external), _costs(draft)
    return Region(entry, frozenset(nodes), exits, laid_out, costs, weight, groups, inputs.shape)


_CHAIN = 6
"""Longer chains of convolutions add up more rounding errors than a gradient to 1 % can have."""


def _rounded(entry: Entry, changed: Sequence[Node]) -> int:
    """Whether convolutions round to bfloat16: by how many of them a change has to pass on its shortest way to the loss.

    Past a residual block it goes on unrounded.
    """
    passed = {entry.node: 0}
    for node in changed[changed.index(entry.node) + 1 :]:
        before = [passed[operand] for operand in node.all_input_nodes if operand in passed]
        if before:
            passed[node] = min(before) + (node.target is aten.convolution.default)
    return program.WINOGRAD if passed[changed[-1]] > _CHAIN else program.WINOGRAD_BFLOAT16


def _lowered(draft: Draft, entry: Entry, changed: Sequence[Node]) -> list[Node]:
    """What lies behind the entry and is in the region: nodes whose every changed operand is."""
    moves, found = set(changed), []
    for node in changed[changed.index(entry.node) + 1 :]:
        moving = [operand for operand in node.all_input_nodes if operand in moves]
        if all(operand in draft.formulas for operand in moving):
            with suppress(UnsupportedError):
                lower(draft, node)
                found.append(node)
    return found


def _leaves(node: Node, nodes: set[Node], needed: frozenset[Node]) -> bool:
    """Whether the rest of the graph reads a node of the region, or it is the loss."""
    readers = [user for user in node.users if user in needed]
    return not readers or any(user not in nodes for user in readers)


def _exit(draft: Draft, node: Node, external: dict[int, int]) -> Exit:
    buffer = draft.closed(node)
    space = draft.spaces[buffer]
    external.setdefault(buffer, len(external))
    shift = space.shift if space.thin else None
    channels = 1 if space.thin else space.channels
    return Exit(node, draft.values.like(node).shape, external[buffer], channels, space.positions, shift)


def _parameter_moved(draft: Draft, entry: Entry) -> Formula:
    """The change behind the perturbed parameter's own operator: of one channel."""
    node, outputs = entry.node, draft.values.like(entry.node)
    if not program.suits(outputs):
        raise UnsupportedError
    target = draft.buffer(space_of(outputs.shape, thin=True))
    if node.target is aten.native_batch_norm.default:
        if draft.read[node] - {0}:
            raise UnsupportedError
        _, mean, scale = norm_of(draft, node)
        if entry.position == 1:
            values = draft.values.sliced(arguments(node)[0])
            draft.step(program.AFFINE, target=target, values=values, mean=mean, scale=scale)
        else:
            draft.step(program.AFFINE, target=target)
        return Formula(target)
    operand, kernel, _, stride, padding, dilation, turned, *_ = arguments(node)
    inputs, weight = draft.values.like(operand), draft.values[kernel]
    if turned or weight.ndim != inputs.ndim:
        raise UnsupportedError
    if entry.position == 2:
        draft.step(program.AFFINE, target=target)
    else:
        shape = window(space_of(inputs.shape), space_of(outputs.shape), weight.shape[2:], stride, padding, dilation)
        # Nobody else reads a convolution's input: these slices are given up with the region.
        draft.step(program.WEIGHT, target=target, values=program.in_slices(draft.values[operand]), shape=shape)
    return Formula(target)


_PRODUCTS = (program.CONVOLVE, *program.TILED)


def _costs(draft: Draft) -> dict[str, Cost]:
    """Operations of the direct formulas, and bytes read and written, of one perturbation; see `cost`."""
    costs: dict[str, Cost] = {}
    for step in draft.steps:
        if step.target == NONE:
            continue
        target = draft.spaces[step.target]
        where = "owner" if step.source == NONE else "thin" if target.thin else "dense"
        window_size = step.shape.channels * step.shape.kernel_height * step.shape.kernel_width
        operations = 2 * window_size if step.kind in _PRODUCTS else 2
        touched = sum(draft.spaces[b].elements for b in (step.source, step.residual, step.target) if b != NONE)
        cost = Cost(float(operations * target.elements), 4.0 * touched) * draft.batch
        costs[where] = costs.get(where, Cost()) + cost
    return costs
