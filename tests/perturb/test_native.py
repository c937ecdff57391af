"""The compiled kernels against the plain formulas of torch in float64.

Errors are relative to the largest value of the result: direct products and sums to 2e-6, Winograd to 1e-5, bfloat16 to
1e-2, of products of up to 67 channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.perturb.native import kernels
from deepzero_core.perturb.native.build import build

pytestmark = pytest.mark.skipif(build().library is None, reason=build().reason or "no kernels")

TOLERANCE = {"direct": 2e-6, "winograd": 1e-5, "bfloat16": 1e-2}
COUNT = 3


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


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

    def __str__(self) -> str:
        parts = (self.space, self.kernel, self.stride, self.padding, self.dilation)
        numbers = "-".join("x".join(map(str, part)) for part in parts)
        return f"{self.channels}to{self.outputs}-{numbers}-b{self.batch}"

    @property
    def convolution(self) -> Callable[[Tensor, Tensor], Tensor]:
        function = F.conv1d if len(self.space) == 1 else F.conv2d
        return partial(function, stride=self.stride, padding=self.padding, dilation=self.dilation)

    def tensors(self, channels: int | None = None) -> tuple[Tensor, Tensor]:
        """δ [P, B, C, …] and W [O, C, …]."""
        torch.manual_seed(0)
        return (
            torch.randn(COUNT, self.batch, channels or self.channels, *self.space),
            torch.randn(self.outputs, self.channels, *self.kernel),
        )

    def run(self, delta: Tensor, weight: Tensor, mode: str = "direct", start: list[int] | None = None) -> Tensor:
        packed = kernels.pack_winograd(weight) if mode == "winograd" else kernels.pack(weight, mode == "bfloat16")
        out_space = self.convolution(delta[0, :1, :1], weight[:1, :1]).shape[2:]
        return kernels.convolve(
            delta, packed, self.kernel, self.stride, self.padding, self.dilation, out_space,
            start=start, winograd=mode == "winograd", bfloat16=mode == "bfloat16",
        )  # fmt: skip


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
    square(5, 8, 4, 1, 1, 0, 1, 33),
    square(3, 4, 8, 5, 3, 2, 1, 65),
    Shape(3, 4, (5, 7), (2, 3), (1, 2), (1, 0), (2, 1), 19),
    Shape(3, 6, (9,), (3,), (2,), (1,), (1,), 24),
    Shape(2, 3, (8,), (3,), (1,), (2,), (2,), 16),
]


@pytest.mark.parametrize("mode", ["direct", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution(shape: Shape, mode: str) -> None:
    if mode == "bfloat16" and not kernels.has_bfloat16():
        pytest.skip("no bfloat16 instructions")
    delta, weight = shape.tensors()
    exact = torch.stack([shape.convolution(one, weight.double()) for one in delta.double()])
    assert error(shape.run(delta, weight, mode), exact) < TOLERANCE[mode]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_of_one_channel_each(shape: Shape) -> None:
    delta, weight = shape.tensors(channels=1)
    start = [shape.channels - 1, 0, shape.channels // 2]
    exact = torch.stack(
        [
            shape.convolution(one, weight.double().narrow(1, first, 1))
            for one, first in zip(delta.double(), start, strict=True)
        ]
    )
    assert error(shape.run(delta, weight, start=start), exact) < TOLERANCE["direct"]


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("side", [4, 5, 6, 7, 8, 11])
def test_winograd(side: int, padding: int) -> None:
    """Sides that tiles of four fill and those that they do not."""
    shape = square(19, 7, side, 3, 1, padding, 1, 16 + side)
    delta, weight = shape.tensors()
    exact = torch.stack([shape.convolution(one, weight.double()) for one in delta.double()])
    assert error(shape.run(delta, weight, "winograd"), exact) < TOLERANCE["winograd"]


def test_winograd_of_many_channels_and_unequal_sides() -> None:
    shape = Shape(67, 10, (5, 9), (3, 3), (1, 1), (1, 1), (1, 1), 21)
    delta, weight = shape.tensors()
    exact = torch.stack([shape.convolution(one, weight.double()) for one in delta.double()])
    assert error(shape.run(delta, weight, "winograd"), exact) < TOLERANCE["winograd"]


def test_bfloat16_is_rounded_and_not_something_else() -> None:
    """The kernel multiplies what torch rounds, and adds in float32."""
    if not kernels.has_bfloat16():
        pytest.skip("no bfloat16 instructions")
    shape = SHAPES[1]
    delta, weight = shape.tensors()
    rounded = delta.bfloat16().double(), weight.bfloat16().double()
    exact = torch.stack([shape.convolution(one, rounded[1]) for one in rounded[0]])
    assert error(shape.run(delta, weight, "bfloat16"), exact) < TOLERANCE["direct"]


@pytest.mark.parametrize("batch", [16, 21, 40])
def test_moments(batch: int) -> None:
    """Means of δ and of (2x̂ + δ)·δ with x̂ = values − mean, from each perturbation's own channels."""
    torch.manual_seed(0)
    delta, values, mean = torch.randn(COUNT, batch, 2, 5, 3), torch.randn(batch, 6, 5, 3), torch.randn(6)
    start = [4, 0, 1]
    found = kernels.moments(delta, values, mean, start)
    centred = values.double() - mean.double().view(-1, 1, 1)
    seen = torch.stack([centred[:, first : first + 2] for first in start])
    exact = delta.double()
    square = (2 * seen + exact) * exact
    expected = torch.stack([exact.mean((1, 3, 4)), square.mean((1, 3, 4))], 2)
    assert error(found, expected) < 1e-6


def test_a_long_sum_is_as_exact_as_a_short_one() -> None:
    """A mean of a million numbers far from 0 in float32 alone would be wrong in the fifth digit."""
    torch.manual_seed(0)
    delta = 1 + torch.rand(1, 64, 1, 128, 128)
    found = kernels.moments(delta, torch.zeros(64, 1, 128, 128), None, None)
    expected = torch.stack([delta.double().mean(), delta.double().square().mean()]).view(1, 1, 2)
    assert error(found, expected) < 1e-6


def results(threads: int) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for mode in ("direct", "winograd", *(["bfloat16"] if kernels.has_bfloat16() else [])):
            shape = square(17, 9, 9, 3, 1, 1, 1, 37)
            found.append(shape.run(*shape.tensors(), mode))
        delta, values = torch.randn(COUNT, 37, 4, 9, 9), torch.randn(37, 4, 9, 9)
        found.append(kernels.moments(delta, values, values.mean((0, 2, 3)), None))
        return found
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    for one, two in zip(results(1), results(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("mode", ["direct", "winograd", "bfloat16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_where_it_is(mode: str, value: float) -> None:
    """It reaches its own perturbation and example alone, and there no number comes out where the formula has none."""
    if mode == "bfloat16" and not kernels.has_bfloat16():
        pytest.skip("no bfloat16 instructions")
    shape = square(4, 3, 8, 3, 1, 1, 1, 20)
    delta, weight = shape.tensors()
    delta[1, 18, 2, 3, 3] = value
    exact = torch.stack([shape.convolution(one, weight.double()) for one in delta.double()])
    found = shape.run(delta, weight, mode)
    assert not found[~exact.isfinite()].isfinite().any()
    others = torch.ones_like(found, dtype=torch.bool)
    others[1, 18] = False
    assert found[others].isfinite().all()


def test_kernels_leave_what_is_not_theirs_to_torch() -> None:
    """Small batches, other types, three axes of space, nothing at all."""
    fits = torch.zeros(2, 32, 3, 4, 4)
    assert kernels.suits(fits) and kernels.suits(fits[..., 0])
    for other in (fits[:, :2], fits.double(), fits.bfloat16(), fits[..., None], fits[:0], fits[..., 0, 0]):
        assert not kernels.suits(other), other.shape


def test_batch_last_copies_only_what_lies_otherwise() -> None:
    value = torch.randn(2, 16, 3, 4)
    laid = kernels.batch_last(value)
    assert torch.equal(laid, value) and laid.stride(1) == 1
    assert kernels.batch_last(laid).data_ptr() == laid.data_ptr()
