"""The compiled kernels against the plain formulas of torch in float64, operator by operator.

Errors are relative to the largest value of the result: direct products and sums to 2e-6, Winograd to 1e-5, bfloat16 to
4e-2, of products of up to 68 channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.perturb.base_values import BaseValues
from deepzero_core.perturb.native import program
from deepzero_core.perturb.native.build import build
from deepzero_core.perturb.regions.draft import Draft, Formula, Statistics, space_of, window
from deepzero_core.perturb.regions.layout import lay_out

pytestmark = pytest.mark.skipif(build().library is None, reason=build().reason or "no kernels")

TOLERANCE = {"direct": 2e-6, "winograd": 1e-5, "bfloat16": 4e-2}
KINDS = {
    "direct": program.CONVOLVE, "winograd": program.WINOGRAD, "bfloat16": program.WINOGRAD_BFLOAT16,
}  # fmt: skip
COUNT = 3


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def run(draft: Draft, inputs: dict[int, Tensor], output: int, channel: list[int] | None = None) -> Tensor:
    """The buffer `output` [P, B, C, H, W] after the steps of a draft, from buffers [P, B, C, H, W]."""
    space = draft.spaces[output]
    found = torch.empty(COUNT, -(-draft.batch // program.lanes()), space.elements, program.lanes())
    external = [program.in_slices(delta, 1) for delta in inputs.values()]
    moved = torch.zeros(COUNT, 4, dtype=torch.int64)
    moved[:, 0] = torch.tensor(channel or [0] * COUNT)
    numbers = {buffer: number for number, buffer in enumerate([*inputs, output])}
    lay_out(draft, numbers).run(moved, torch.ones(COUNT), [*external, found])
    return program.from_slices(found, draft.batch, 1).reshape(COUNT, draft.batch, -1, space.height, space.width)


def empty(batch: int) -> Draft:
    return Draft(BaseValues(), {}, {}, program.WINOGRAD, batch)


@dataclass(frozen=True)
class Shape:
    """A convolution; `space`, `kernel` and the others have one entry per axis."""

    channels: int
    outputs: int
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    batch: int
    groups: int = 1

    def __str__(self) -> str:
        parts = (self.space, self.kernel, self.stride, self.padding, self.dilation)
        numbers = "-".join("x".join(map(str, part)) for part in parts)
        groups = f"-g{self.groups}" if self.groups > 1 else ""
        return f"{self.channels}to{self.outputs}-{numbers}-b{self.batch}{groups}"

    @property
    def convolution(self) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(F.conv2d, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)

    def tensors(self, channels: int | None = None) -> tuple[Tensor, Tensor]:
        """δ [P, B, C, …] and W [O, C, …]."""
        torch.manual_seed(0)
        return (
            torch.randn(COUNT, self.batch, channels or self.channels, *self.space),
            torch.randn(self.outputs, self.channels // self.groups, *self.kernel),
        )

    def run(self, delta: Tensor, weight: Tensor, mode: str = "direct", channel: list[int] | None = None) -> Tensor:
        draft = empty(self.batch)
        out = space_of(self.convolution(torch.zeros(1, self.channels, *self.space), weight).shape)
        source = draft.buffer(replace(space_of(delta[0].shape, channel is not None), channels=self.channels))
        shape = window(draft.spaces[source], out, self.kernel, self.stride, self.padding, self.dilation, self.groups)
        depthwise = channel is not None and self.groups == self.channels == self.outputs
        target = draft.buffer(replace(out, thin=depthwise))
        kind = KINDS[mode]
        packed = program.pack(weight, self.groups) if kind == program.CONVOLVE else program.pack_winograd(weight, kind)
        draft.step(
            kind, source=source, target=target, shape=shape, weight=packed, groups=self.groups,
            group_channels=weight.shape[1],
        )  # fmt: skip
        return run(draft, {source: delta}, target, channel)


def square(
    channels: int, outputs: int, side: int, kernel: int, stride: int, padding: int, dilation: int, batch: int
) -> Shape:
    return Shape(
        channels, outputs, (side, side), (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, batch
    )  # fmt: skip


SHAPES = [
    square(3, 5, 6, 3, 1, 1, 1, 16),
    square(7, 13, 5, 3, 1, 0, 1, 17),
    square(4, 6, 7, 3, 2, 1, 1, 31),
    square(2, 7, 7, 3, 1, 2, 2, 40),
    square(5, 8, 4, 1, 1, 0, 1, 8),
    square(3, 4, 8, 5, 3, 2, 1, 65),
    Shape(3, 4, (5, 7), (2, 3), (1, 2), (1, 0), (2, 1), 19),
    Shape(3, 6, (1, 9), (1, 3), (1, 2), (0, 1), (1, 1), 24),
    replace(square(6, 6, 6, 3, 1, 1, 1, 18), groups=6),
    replace(square(4, 8, 7, 5, 2, 2, 1, 16), groups=4),
    replace(square(6, 9, 5, 3, 1, 1, 1, 21), groups=3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution(shape: Shape) -> None:
    delta, weight = shape.tensors()
    exact = torch.stack([shape.convolution(one, weight.double()) for one in delta.double()])
    assert error(shape.run(delta, weight), exact) < TOLERANCE["direct"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_of_one_channel_each(shape: Shape) -> None:
    delta, weight = shape.tensors(channels=1)
    channel = [shape.channels - 1, 0, shape.channels // 2]
    whole = torch.zeros(COUNT, shape.batch, shape.channels, *shape.space).double()
    for each, first in enumerate(channel):
        whole[each, :, first] = delta[each, :, 0]
    exact = torch.stack([shape.convolution(one, weight.double()) for one in whole])
    found = shape.run(delta, weight, channel=channel)
    if found.shape[2] == 1:  # depthwise: the others stay
        exact = torch.stack([one.narrow(1, first, 1) for one, first in zip(exact, channel, strict=True)])
    assert error(found, exact) < TOLERANCE["direct"]


WINOGRAD = ["winograd", "bfloat16"]


def skip_without(mode: str) -> None:
    if mode == "bfloat16" and not program.has_bfloat16():
        pytest.skip("no bfloat16 instructions")


@pytest.mark.parametrize("mode", WINOGRAD)
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("side", [4, 5, 6, 7, 8, 11])
def test_winograd(side: int, padding: int, mode: str) -> None:
    """Sides that tiles of four or three fill and those that they do not."""
    skip_without(mode)
    shape = square(18, 7, side, 3, 1, padding, 1, 16 + side)
    delta, weight = shape.tensors()
    exact = torch.stack([shape.convolution(one, weight.double()) for one in delta.double()])
    assert error(shape.run(delta, weight, mode), exact) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", WINOGRAD)
def test_winograd_of_many_channels_and_unequal_sides(mode: str) -> None:
    skip_without(mode)
    shape = Shape(68, 10, (5, 9), (3, 3), (1, 1), (1, 1), (1, 1), 21)
    delta, weight = shape.tensors()
    exact = torch.stack([shape.convolution(one, weight.double()) for one in delta.double()])
    assert error(shape.run(delta, weight, mode), exact) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", ["direct", *WINOGRAD])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_where_it_is(mode: str, value: float) -> None:
    """It reaches its own perturbation and example alone, and there no number comes out where the formula has none."""
    skip_without(mode)
    shape = square(4, 3, 8, 3, 1, 1, 1, 20)
    delta, weight = shape.tensors()
    delta[1, 18, 2, 3, 3] = value
    exact = torch.stack([shape.convolution(one, weight.double()) for one in delta.double()])
    found = shape.run(delta, weight, mode)
    assert not found[~exact.isfinite()].isfinite().any()
    others = torch.ones_like(found, dtype=torch.bool)
    others[1, 18] = False
    assert found[others].isfinite().all()


@pytest.mark.parametrize("batch", [8, 16, 21, 40])
def test_what_fills_up_the_last_slice_counts_nowhere(batch: int) -> None:
    value = torch.randn(batch, 3, 4, 5)
    assert torch.equal(program.from_slices(program.in_slices(value), batch), value)
    assert program.in_slices(value).shape == (-(-batch // program.lanes()), 3, 4, 5, program.lanes())


# What follows a convolution

CHANNELS, SPACE = 5, (5, 7)
SLOPES = [None, 0.0, 0.1]
WINDOWS = {
    "none": None,
    "halves": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "overlap": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "ceil": ((3, 2), (2, 2), (1, 0), (1, 1), True),
    "dilated": ((2, 2), (1, 1), (1, 1), (2, 1), False),
}


@dataclass(frozen=True)
class Given:
    """What a chain starts from; thin: the channels that move."""

    batch: int
    channel: list[int] | None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        width = 1 if self.channel else CHANNELS
        made = {
            "delta": torch.randn(COUNT, self.batch, width, *SPACE),
            "residual": torch.randn(COUNT, self.batch, width, *SPACE),
            "values": torch.randn(self.batch, CHANNELS, *SPACE) + 1,
            "gamma": torch.randn(CHANNELS),
            "beta": torch.randn(CHANNELS),
            "base": torch.randn(self.batch, CHANNELS, *SPACE),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def seen(self, value: Tensor) -> Tensor:
        """The channels of base values [B, C, …] or [C] that move, of every perturbation."""
        axis = 0 if value.ndim == 1 else 1
        parts = [value.narrow(axis, first, 1) if self.channel else value for first in self.channel or [0] * COUNT]
        return torch.stack(parts)


def normalised(values: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(values, None, None, gamma, beta, training=True)


@pytest.mark.parametrize("thin", [False, True], ids=["dense", "thin"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("pool", WINDOWS)
def test_every_chain(pool: str, norm: bool, thin: bool) -> None:
    """Normalisation, residual, rectifier and pooling are the difference of what torch computes."""
    for slope, residual, batch in product(SLOPES, [False, True], [16, 21]):
        given = Given(batch, [3, 0, 1] if thin else None)
        draft = empty(batch)
        source = draft.buffer(space_of(given.delta[0].shape, thin))
        inputs = {source: given.delta}
        formula = Formula(source)
        y, moved = given.seen(given.values).double(), given.delta.double()
        if norm:
            wide = given.values.double()
            mean, variance = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
            scale = (variance + 1e-5).rsqrt().float()
            draft.norms.append(
                Statistics(source, program.in_slices(given.values), mean.float(), scale, given.gamma, given.beta)
            )
            draft.step(program.MOMENTS, source=source, norm=0)
            formula = Formula(source, norm=0)
            affine = [given.seen(part).double() for part in (given.gamma, given.beta)]
            before = torch.stack([normalised(y[p], affine[0][p], affine[1][p]) for p in range(COUNT)])
            after = torch.stack([normalised(y[p] + moved[p], affine[0][p], affine[1][p]) for p in range(COUNT)])
        else:
            before, after = y, y + moved
        base = given.values if not norm else None
        if residual:
            buffer = draft.buffer(space_of(given.residual[0].shape, thin))
            inputs[buffer] = given.residual
            stays = given.base  # the residual's own base values
            formula = Formula(source, norm=formula.norm, residual=buffer)
            before, after = before + given.seen(stays), after + given.seen(stays) + given.residual
            base = (normalised(given.values, given.gamma, given.beta) if norm else given.values) + stays
        if slope is not None:
            before, after = F.leaky_relu(before, slope), F.leaky_relu(after, slope)
        formula = Formula(
            formula.source, norm=formula.norm, residual=formula.residual, slope=slope,
            base=program.in_slices(base) if base is not None and (slope is not None or pool != "none") else None,
        )  # fmt: skip
        chosen = WINDOWS[pool]
        if chosen is None:
            target = draft.evaluated(formula)
        else:
            kernel, stride, padding, dilation, ceil = chosen
            before, after = (
                torch.stack([F.max_pool2d(one, kernel, stride, padding, dilation, ceil) for one in each])
                for each in (before, after)
            )
            shape = window(draft.spaces[source], space_of(before[0].shape), kernel, stride, padding, dilation)
            target = draft.pooled(formula, shape)
        found = run(draft, inputs, target, given.channel)
        torch.testing.assert_close(found.double(), after - before, rtol=2e-5, atol=2e-5)


ACTIVATIONS: dict[str, tuple[int, tuple[float, ...], Callable[[Tensor], Tensor]]] = {
    "sigmoid": (program.SIGMOID, (), torch.sigmoid),
    "tanh": (program.TANH, (), torch.tanh),
    "silu": (program.SILU, (), F.silu),
    "gelu": (program.GELU, (), F.gelu),
    "gelu_tanh": (program.GELU_TANH, (), partial(F.gelu, approximate="tanh")),
    "elu": (program.ELU, (0.7, 1.1, 1.3), lambda y: torch.ops.aten.elu(y, 0.7, 1.1, 1.3)),
    "relu6": (program.CLAMP, (0, 6), F.relu6),
    "hardtanh": (program.CLAMP, (-0.3, 0.4), lambda y: F.hardtanh(y, -0.3, 0.4)),
    "hardsigmoid": (program.HARD_SIGMOID, (), F.hardsigmoid),
    "hardswish": (program.HARD_SWISH, (), F.hardswish),
}


@pytest.mark.parametrize("size", [1e-7, 1e-2, 0.5, 4.0, 40.0])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, size: float) -> None:
    """f(y + δ) − f(y) for one channel and for all, from far below 0 to far above; relative to the largest change."""
    function, parameters, exact = ACTIVATIONS[name]
    for channel in (None, [3, 0, 1]):
        given = Given(21, channel)
        draft = empty(21)
        source = draft.buffer(space_of(given.base.shape, channel is not None))
        target = draft.buffer(draft.spaces[source])
        base = 3 * given.base
        draft.step(
            program.ACTIVATE, source=source, target=target, base=program.in_slices(base), function=function,
            parameters=parameters,
        )  # fmt: skip
        delta = size * given.delta
        y = given.seen(base).double()
        assert error(run(draft, {source: delta}, target, channel), exact(y + delta.double()) - exact(y)) < 1e-6


def test_activation_behind_a_normalisation() -> None:
    """y is then what the normalisation gives, and is not kept."""
    given = Given(21, None)
    draft = empty(21)
    source = draft.buffer(space_of(given.base.shape))
    target = draft.buffer(draft.spaces[source])
    wide = given.values.double()
    mean, scale = wide.mean((0, 2, 3)), (wide.var((0, 2, 3), correction=0) + 1e-5).rsqrt()
    draft.norms.append(
        Statistics(source, program.in_slices(given.values), mean.float(), scale.float(), given.gamma, given.beta)
    )
    draft.step(program.MOMENTS, source=source, norm=0)
    draft.step(program.ACTIVATE, source=source, target=target, norm=0, function=program.SILU)
    y = normalised(wide, given.gamma.double(), given.beta.double())
    assert error(run(draft, {source: given.delta}, target), F.silu(y + given.delta.double()) - F.silu(y)) < 1e-6


@pytest.mark.parametrize("thin", [False, True], ids=["dense", "thin"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 2), (1, 0))])
def test_average_pooling(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], thin: bool
) -> None:
    given = Given(21, [3, 0, 1] if thin else None)
    exact = torch.stack([F.avg_pool2d(one, kernel, stride, padding) for one in given.delta.double()])
    draft = empty(21)
    source = draft.buffer(space_of(given.base.shape, thin))
    shape = window(draft.spaces[source], space_of(exact[0].shape), kernel, stride, padding, (1, 1))
    target = draft.buffer(replace(draft.spaces[source], height=shape.out_height, width=shape.out_width))
    draft.step(program.AVERAGE, source=source, target=target, shape=shape)
    assert error(run(draft, {source: given.delta}, target, given.channel), exact) < 1e-6


def test_a_long_sum_is_as_exact_as_a_short_one() -> None:
    """Added in float32, a million changes far from 0 would be wrong in the fifth digit."""
    torch.manual_seed(0)
    batch, space = 64, (128, 128)
    delta = (1 + torch.rand(1, batch, 1, *space)).expand(COUNT, -1, -1, -1, -1)
    values = torch.randn(batch, 1, *space)
    draft = empty(batch)
    source = draft.buffer(space_of(values.shape))
    wide = values.double()
    scale = (wide.var(correction=0) + 1e-5).rsqrt().float().view(1)
    draft.norms.append(Statistics(source, program.in_slices(values), wide.mean().float().view(1), scale, None, None))
    draft.step(program.MOMENTS, source=source, norm=0)
    target = draft.evaluated(Formula(source, norm=0))
    found = run(draft, {source: delta}, target)[0].double()
    exact = F.batch_norm(wide + delta[0], None, None, training=True) - F.batch_norm(wide, None, None, training=True)
    assert error(found, exact) < 1e-6


def test_nothing_cancels() -> None:
    """A change of 1e-7 beside values of 1 keeps its digits through rectifier and pooling."""
    given = Given(18, None)
    draft = empty(18)
    source = draft.buffer(space_of(given.delta[0].shape))
    shape = window(draft.spaces[source], space_of(torch.Size([1, CHANNELS, 2, 3])), (2, 2), (2, 2), (0, 0), (1, 1))
    target = draft.pooled(Formula(source, base=program.in_slices(given.base), slope=0.0), shape)
    small = 1e-7 * given.delta
    found = run(draft, {source: small}, target)
    y = given.base.double()
    exact = torch.stack([F.max_pool2d((y + one).relu(), 2) - F.max_pool2d(y.relu(), 2) for one in small.double()])
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-13)


def test_programs_leave_what_is_not_theirs_to_torch() -> None:
    """Small batches, other types, three axes of space, nothing at all."""
    fits = torch.zeros(32, 3, 4, 4)
    assert program.suits(fits) and program.suits(fits[..., 0])
    for other in (fits[:1], fits.double(), fits.bfloat16(), fits[..., None], fits[:0], fits[..., 0, 0]):
        assert not program.suits(other), other.shape
