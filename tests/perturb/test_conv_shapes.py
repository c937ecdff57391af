"""Drawn convolutions, the thin stretches behind them, and drawn compositions: float64 against the slow reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import energy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb.evaluator import prepare

CONVOLUTIONS: dict[tuple[int, bool], type[nn.Module]] = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}

drawn = settings(max_examples=20, derandomize=True, deadline=None)


def sampled(parameters: dict[str, Tensor], generator: torch.Generator, most: int = 12) -> dict[str, Tensor]:
    """A few coordinates of every parameter: the reference runs one pass for each."""
    return {
        name: torch.randperm(value.numel(), generator=generator)[:most]
        for name, value in parameters.items()
        if value.numel()
    }


def assert_agrees(module: nn.Module, inputs: Tensor, targets: Tensor, training: bool) -> None:
    module.double().train(training)
    assert prepare(module, inputs, targets, energy).untraced is None
    coordinates = sampled(dict(module.named_parameters()), torch.Generator().manual_seed(1))
    found = cge(module, inputs, targets, energy, coordinates=coordinates)
    expected = reference.cge(module, inputs, targets, energy, coordinates=coordinates)
    assert found.queries == expected.queries
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            found.gradients[name], gradient, rtol=1e-5, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@dataclass(frozen=True)
class Drawn:
    """A convolution, its input shape, and the modules behind it."""

    first: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rest: tuple[str, ...]
    training: bool


@st.composite
def convolutions(draw: st.DrawFn) -> Drawn:
    axes, transposed = draw(st.sampled_from(sorted(CONVOLUTIONS)))
    # Three dimensions grow fast: every query of the reference is a whole pass.
    most = {1: 7, 2: 6, 3: 4}[axes]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = tuple(draw(st.integers(0, size - 1)) for size in kernel)
    extra = {"output_padding": tuple(draw(st.integers(0, s - 1)) for s in stride)} if transposed else {}
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    space = tuple(
        draw(st.integers(1 if transposed else max(1, r - 2 * p), max(most, r)))
        for r, p in zip(reach, padding, strict=True)
    )
    if transposed:
        added = extra["output_padding"]
        assume(
            all(
                (n - 1) * s - 2 * p + r + a > 0
                for n, s, p, r, a in zip(space, stride, padding, reach, added, strict=True)
            )
        )
    kind, bias = CONVOLUTIONS[axes, transposed], draw(st.booleans())
    batch = draw(st.integers(1, 3))
    stages = ("norm", "relu", "leaky", "max", "average", "conv", "grouped", "transposed")
    return Drawn(
        lambda: kind(*channels, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias, **extra),
        (batch, channels[0], *space),
        tuple(draw(st.lists(st.sampled_from(stages), max_size=4))) + draw(st.sampled_from([(), ("flat",)])),
        draw(st.booleans()),
    )


def stage(name: str, shape: torch.Size) -> nn.Module | None:
    """The module of that name for outputs of this shape; None where the shape does not allow it."""
    channels, axes = shape[1], len(shape) - 2
    smallest = min(shape[2:])
    groups = next(g for g in (3, 2, 1) if channels % g == 0)
    made: dict[str, Callable[[], nn.Module]] = {
        "norm": lambda: NORMS[axes](channels),
        "relu": nn.ReLU,
        "leaky": lambda: nn.LeakyReLU(0.2),
        "max": lambda: MAX_POOLS[axes](2, 1),
        "average": lambda: AVERAGE_POOLS[axes](2, padding=1),
        "conv": lambda: CONVOLUTIONS[axes, False](channels, 2, 1),
        "grouped": lambda: CONVOLUTIONS[axes, False](channels, 2 * groups, 2, groups=groups),
        "transposed": lambda: CONVOLUTIONS[axes, True](channels, 2, 2, stride=2),
        "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(shape[1:].numel(), 3)),
    }
    return made[name]() if smallest >= (2 if name in ("max", "average", "grouped") else 1) else None


@drawn
@given(convolutions())
def test_convolution_and_the_thin_stretch_behind_it(case: Drawn) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(case.shape, dtype=torch.float64), torch.randn(case.shape[0], dtype=torch.float64)
    modules = [case.first().double()]
    outputs = modules[0](inputs)
    assume(0 < outputs.numel() < 3000)
    for name in case.rest:
        if name == "norm" and outputs.numel() == outputs.shape[1]:
            continue  # one value per channel has no batch statistics
        following = stage(name, outputs.shape)
        if following is not None:
            modules.append(following.double())
            outputs = modules[-1](outputs)
            assume(outputs.numel() < 3000)
    assert_agrees(nn.Sequential(*modules), inputs, targets, case.training)


class Composition(nn.Module):
    """Operators that keep [B, 4, 5, 6], in any order, with a parameter and earlier values mixed in."""

    def __init__(self, operators: tuple[str, ...]) -> None:
        super().__init__()
        self.operators = operators
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.linear, self.layer_norm, self.group_norm = nn.Linear(6, 6), nn.LayerNorm((5, 6)), nn.GroupNorm(2, 4)
        self.gate, self.scalar = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for name in self.operators:
            y = SHAPE_PRESERVING[name](self, x, y)
        return y


SHAPE_PRESERVING: dict[str, Callable[[Composition, Tensor, Tensor], Tensor]] = {
    "add": lambda m, x, y: y + m.scalar * x,
    "mul": lambda m, x, y: y * m.gate,
    "residual": lambda m, x, y: y + F.relu(m.conv(y)),
    "cat_slice": lambda m, x, y: torch.cat([x, y, y * 2], 1)[:, 3:7],
    "cat_batch": lambda m, x, y: torch.cat([y, x])[: len(y)] + torch.cat([x, y])[len(y) :],
    "permute": lambda m, x, y: torch.tanh(y.permute(2, 0, 3, 1)).permute(1, 3, 0, 2),
    "reshape": lambda m, x, y: y.reshape(len(y), 2, 10, 6).transpose(1, 2).reshape(y.shape),
    "softmax": lambda m, x, y: F.softmax(y, 1) + y,
    "norm": lambda m, x, y: m.norm(y),
    "layer_norm": lambda m, x, y: m.layer_norm(y),
    "group_norm": lambda m, x, y: m.group_norm(y),
    "where": lambda m, x, y: torch.where(y > 0.1, y, x),
    "masked": lambda m, x, y: F.softmax(y.masked_fill(x > 0.5, -torch.inf), -1).nan_to_num(),
    "pad_crop": lambda m, x, y: F.pad(y, (1, 2, 0, 1, 1, 0), value=0.5)[:, 1:, :5, 1:7],
    "crop_pad": lambda m, x, y: F.pad(y, (-1, 1, 0, 0, -1, 1)),
    "linear": lambda m, x, y: m.linear(y),
    "pool": lambda m, x, y: F.max_pool2d(y, 3, 1, 1),
    "mean": lambda m, x, y: y - y.mean((0, 2), keepdim=True) + y.sum(1, keepdim=True) / 9,
    "split": lambda m, x, y: torch.stack(y.unbind(1)[::-1], 1) * torch.cat(y.split([1, 3], 1)[::-1], 1),
    "attention": lambda m, x, y: F.scaled_dot_product_attention(y, x, y),
    "in_place": lambda m, x, y: y.clone().index_fill_(1, torch.tensor([2]), 0.3).add_(y),
    "shift": lambda m, x, y: y.roll(1, 2) - y.flip(1) / (1 + x.square()),
}


@drawn
@given(st.lists(st.sampled_from(sorted(SHAPE_PRESERVING)), min_size=1, max_size=5), st.booleans())
def test_composition(operators: list[str], training: bool) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    assert_agrees(Composition(tuple(operators)), inputs, targets, training)
