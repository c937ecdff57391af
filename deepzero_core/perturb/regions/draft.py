"""A program while it is written: buffers and steps by number, changes that are still formulas.

    e = scale·δ + shift + rescale·x̂ + residual          BatchNorm's difference, and the residual sum
    Δ = max(e + min(y, 0), −max(y, 0))                   the (leaky) rectifier's

What a normalisation, a sum or a rectifier does to a change is noted in a `Formula`, and evaluated in one pass over
memory when an operator needs numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from deepzero_core.perturb.base_values import BaseValues
from deepzero_core.perturb.native import program
from deepzero_core.perturb.native.program import NONE, Shape, Step


class UnsupportedError(Exception):
    """The node stays outside the region."""


@dataclass(frozen=True)
class Space:
    """A buffer: the change of `channels` channels of [height, width], or of the perturbed one moved on by `shift`."""

    channels: int
    height: int
    width: int
    thin: bool
    shift: int = 0

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def elements(self) -> int:
        """Of one example."""
        return (1 if self.thin else self.channels) * self.positions


@dataclass(frozen=True)
class Formula:
    """A change: buffer `source`, and what is still to be done to it; see `chain.h`."""

    source: int
    norm: int = NONE
    scale: Tensor | None = None
    residual: int = NONE
    base: Tensor | None = None
    """y, of the rectifier or the pooling; None where it is what the normalisation gives."""
    slope: float | None = None
    displaced: bool = False
    """Whether something that does not move was added to the base values."""

    @property
    def plain(self) -> bool:
        return self.norm == NONE and self.scale is None and self.residual == NONE and self.slope is None

    @property
    def normalised(self) -> bool:
        """Whether a normalisation gives this, and nothing behind it."""
        return self.norm != NONE and self.takes_terms and not self.displaced

    @property
    def takes_terms(self) -> bool:
        """Whether a residual or a rectifier may follow."""
        return self.residual == NONE and self.slope is None


@dataclass(frozen=True)
class Statistics:
    """A normalisation by the statistics of the batch: base values, and by channel their mean and (v + ε)^−½."""

    source: int
    values: Tensor
    mean: Tensor
    scale: Tensor
    gamma: Tensor | None
    beta: Tensor | None


@dataclass
class Draft:
    """Buffers, normalisations and steps, in order, and the change of every node that is in the region."""

    values: BaseValues
    read: Mapping[Node, frozenset[int]]
    packed: dict[Any, Tensor]
    """Weights that other regions of the same base pass have packed."""
    winograd: int
    """The kind of a convolution by Winograd's method, where channels go in pairs."""
    batch: int
    spaces: list[Space] = field(default_factory=list)
    norms: list[Statistics] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    formulas: dict[Node, Formula] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)

    def buffer(self, space: Space) -> int:
        self.spaces.append(space)
        return len(self.spaces) - 1

    def address(self, tensor: Tensor | None) -> int | None:
        """Of a tensor that lives as long as the program."""
        if tensor is None:
            return None
        self.kept.append(tensor)
        return tensor.data_ptr()

    def once(self, key: Any, owner: Tensor, compute: Any) -> Tensor:
        """Computed once for a base pass. `owner` is kept, so that its id stays its own."""
        if key not in self.packed:
            self.packed[key] = compute()
            self.packed["owner", key] = owner
        return self.packed[key]

    def step(self, kind: int, *, source: int = NONE, residual: int = NONE, target: int = NONE, norm: int = NONE,
             shape: Shape | None = None, weight: Tensor | None = None, values: Tensor | None = None,
             mean: Tensor | None = None, scale: Tensor | None = None, base: Tensor | None = None,
             rectify: bool = False, pool: bool = False, front: int = 0, groups: int = 1, group_channels: int = 0,
             function: int = 0, slope: float = 0.0, parameters: Sequence[float] = ()) -> None:  # fmt: skip
        """`values` and `base` are base values in slices, [S, C, *space, lanes]."""
        self.steps.append(
            Step(
                kind=kind, source=source, residual=residual, target=target, norm=norm, shape=shape or Shape(),
                weight=self.address(weight), values=self.address(values), mean=self.address(mean),
                scale=self.address(scale), base=self.address(base),
                values_channels=0 if values is None else values.shape[1],
                base_channels=0 if base is None else base.shape[1],
                rectify=rectify, pool=pool, front=front, groups=groups, group_channels=group_channels,
                function=function, slope=slope, parameters=tuple(parameters),
            )
        )  # fmt: skip

    def space_of(self, formula: Formula) -> Space:
        """Of what a formula gives."""
        return self.spaces[formula.source]

    def closed(self, node: Node) -> int:
        """The buffer that holds a node's change."""
        formula = self.formulas[node]
        if not formula.plain:
            self.formulas[node] = formula = Formula(self.evaluated(formula))
        return formula.source

    def evaluated(self, formula: Formula) -> int:
        space = self.space_of(formula)
        target = self.buffer(space)
        self._chain(formula, target)
        return target

    def pooled(self, formula: Formula, shape: Shape) -> int:
        """Max-pooling of what a formula gives."""
        space = self.space_of(formula)
        target = self.buffer(replace(space, height=shape.out_height, width=shape.out_width))
        self._chain(formula, target, shape)
        return target

    def _chain(self, formula: Formula, target: int, pool: Shape | None = None) -> None:
        self.step(
            program.CHAIN, source=formula.source, residual=formula.residual, target=target, norm=formula.norm,
            scale=formula.scale, base=formula.base, rectify=formula.slope is not None, slope=formula.slope or 0.0,
            pool=pool is not None, shape=pool,
        )  # fmt: skip


def arguments(node: Node) -> tuple[Any, ...]:
    """An operator's arguments; which of them are nodes, and what the others are, its schema says."""
    return node.args


def two(values: Sequence[int], missing: int) -> tuple[int, int]:
    """One- and two-dimensional space alike: a missing height in front."""
    given = [missing] * (2 - len(values)) + list(values)
    return given[0], given[1]


def space_of(shape: torch.Size, thin: bool = False) -> Space:
    """Of a base value [B, C, *space]; without axes of space it is one position."""
    return Space(shape[1], *two(shape[2:4], 1), thin)


def window(
    inputs: Space, outputs: Space, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int = 1,
) -> Shape:  # fmt: skip
    """From a buffer to a buffer, of one group of channels; one entry per axis of space."""
    return Shape(
        1 if inputs.thin else inputs.channels // groups, outputs.channels // groups,
        inputs.height, inputs.width, outputs.height, outputs.width,
        *two(kernel, 1), *two(stride, 1), *two(padding, 0), *two(dilation, 1),
    )  # fmt: skip


def as_float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(torch.float32).contiguous()
