"""Chains against the plain formula in float64, kernel by kernel, and the engine on them against the slow reference."""

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from cases import Residual
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb.chain import Chain, Terms, added, pooled, rectified, terms_of
from deepzero_core.perturb.changes import Block, Change, dense, take
from deepzero_core.perturb.evaluator import prepare
from deepzero_core.perturb.native import kernels
from deepzero_core.perturb.native.build import build

COUNT, CHANNELS, WIDTH = 3, 5, 2
START = (3, 0, 1)
SLOPES = [None, 0.0, 0.1]
WINDOWS = {
    "halves": ((2, 2), (2, 2), (0, 0), (1, 1), False),
    "overlap": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "ceil": ((3, 2), (2, 2), (1, 0), (1, 1), True),
    "dilated": ((2, 2), (1, 1), (1, 1), (2, 1), False),
}


def terms(present: dict[str, bool], batch: int = 21, space: tuple[int, ...] = (5, 7), block: bool = True) -> Terms:
    """Terms with those that are named: [P, B, w, *space], [P, w], [B, C, *space], [C]."""
    torch.manual_seed(0)
    width = WIDTH if block else CHANNELS
    made: dict[str, Any] = {
        "scale": torch.randn(COUNT, width),
        "shift": torch.randn(COUNT, width),
        "rescale": torch.randn(COUNT, width),
        "values": torch.randn(batch, CHANNELS, *space),
        "mean": torch.randn(CHANNELS),
        "residual": torch.randn(COUNT, batch, width, *space),
    }
    source = torch.randn(COUNT, batch, width, *space)
    return Terms(source, Block(1, START) if block else None, **{name: made[name] for name in made if present[name]})


def plain(terms: Terms) -> Tensor:
    """e = scale·δ + shift + rescale·(values − mean) + residual in float64."""

    def channels(values: Tensor | None, default: float) -> Any:
        space = [1] * (terms.source.ndim - 3)
        return default if values is None else values.double().view(COUNT, 1, -1, *space)

    total = channels(terms.scale, 1) * terms.source.double() + channels(terms.shift, 0)
    if terms.values is not None:
        mean = terms.mean if terms.mean is not None else torch.zeros(CHANNELS)
        centred = terms.values.double() - mean.double().view(-1, *[1] * (terms.source.ndim - 3))
        total = total + channels(terms.rescale, 0) * seen(centred, terms)
    return total if terms.residual is None else total + terms.residual.double()


def seen(base: Tensor, terms: Terms) -> Tensor:
    return take(base.double(), terms.block, terms.source.shape[2])


def activation(y: Tensor, slope: float | None) -> Tensor:
    return y if slope is None else F.leaky_relu(y, slope)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


NAMES = ("scale", "shift", "rescale", "residual")
ALL = (*NAMES, "values", "mean")
COMBINATIONS = [
    dict(zip(NAMES, flags, strict=True)) | {"values": flags[2], "mean": flags[2] and flags[3]}
    for flags in product([False, True], repeat=4)
    if flags[0] or not flags[1]  # no rule shifts without scaling
]


def described(present: dict[str, bool]) -> str:
    return "-".join(name for name in NAMES if present[name]) or "nothing"


@pytest.mark.parametrize("present", COMBINATIONS, ids=described)
def test_every_combination_of_terms(present: dict[str, bool], arithmetic: str) -> None:
    for slope, block in product(SLOPES, [True, False]):
        given = terms(present, block=block)
        assert given.native is (arithmetic == "kernels")
        base = torch.randn(21, CHANNELS, 5, 7)
        change = Chain(given) if slope is None else rectified(Chain(given), base, slope)
        total, y = plain(given), seen(base, given)
        assert_close(change.delta, activation(y + total, slope) - activation(y, slope))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("slope", SLOPES)
def test_pooling_of_every_combination(window: str, slope: float | None) -> None:
    if build().library is None:
        pytest.skip(build().reason)
    kernel, stride, padding, dilation, ceil = WINDOWS[window]

    def pool(y: Tensor) -> Tensor:
        return torch.stack([F.max_pool2d(one, kernel, stride, padding, dilation, ceil) for one in y])

    for present, block in product(COMBINATIONS, [True, False]):
        given = terms(present, batch=18, block=block)
        base = torch.randn(18, CHANNELS, 5, 7)
        change = Chain(given) if slope is None else rectified(Chain(given), base, slope)
        y = seen(base, given).expand(COUNT, *[-1] * 4)
        # What is pooled is the operand of the pooling: behind a rectifier, its result.
        after = pool(activation(y + plain(given), slope)) - pool(activation(y, slope))
        size = (kernel, stride, padding, dilation, after.shape[3:])
        found = pooled(change, activation(base, slope), size)
        assert found is not None
        assert_close(found.delta, after)


def test_one_axis_of_space(arithmetic: str) -> None:
    given = terms(dict.fromkeys(ALL, True), space=(9,))
    base = torch.randn(21, CHANNELS, 9)
    y, total = seen(base, given), plain(given)
    assert_close(rectified(Chain(given), base).delta, (y + total).relu() - y.relu())


def test_a_chain_is_evaluated_once_and_knows_its_size_before() -> None:
    given = terms(dict.fromkeys(ALL, True))
    change = Chain(given)
    assert (change.count, change.width, change.terms) == (COUNT, WIDTH, given)
    delta = change.delta
    assert change.terms is None and change.delta is delta
    assert terms_of(change).source is delta, "an evaluated chain begins another"


def test_what_adds_to_a_chain() -> None:
    """One residual, on the chain's own block or, where all of the chain moves, on any; a rectified chain takes none."""
    shape = torch.Size([21, CHANNELS, 5, 7])
    bare, whole = (terms(dict.fromkeys(ALL, False), block=block) for block in (True, False))
    other = Change(torch.randn_like(bare.source), bare.block)
    elsewhere = Change(other.delta, Block(1, (0, 0, 0)))
    for change, added_one in ((Chain(bare), other), (other, Chain(bare))):
        total = added(change, added_one, shape)
        assert total is not None and total.block == bare.block
        assert_close(total.delta, bare.source.double() + other.delta.double())
    thick = added(Chain(whole), elsewhere, shape)
    assert thick is not None and thick.block is None
    assert_close(thick.delta, whole.source.double() + dense(elsewhere, shape).double())
    assert added(Chain(bare), elsewhere, shape) is None
    twice = added(Chain(bare), other, shape)
    assert twice is not None and added(twice, other, shape) is None
    assert added(rectified(Chain(bare), torch.randn(*shape)), other, shape) is None
    assert added(other, other, shape) is None


def test_nothing_cancels() -> None:
    """A change of 1e-7 beside values of 1 keeps its digits through normalisation, rectifier and pooling."""
    if build().library is None:
        pytest.skip(build().reason)
    given = terms({"scale": True} | dict.fromkeys(ALL[1:], False), space=(4, 4))
    small = Terms(1e-7 * given.source, given.block, scale=given.scale)
    base = torch.randn(21, CHANNELS, 4, 4)
    found = pooled(rectified(Chain(small), base), base.relu(), ((2, 2), (2, 2), (0, 0), (1, 1), torch.Size([2, 2])))
    assert found is not None
    y = seen(base, small).expand(COUNT, *[-1] * 4)

    def pool(y: Tensor) -> Tensor:
        return F.max_pool2d(y.flatten(0, 1).relu(), 2).unflatten(0, y.shape[:2])

    exact = pool(y + plain(small)) - pool(y)
    torch.testing.assert_close(found.delta.double(), exact, rtol=1e-5, atol=1e-13)


# The engine


class DnCNN(nn.Module):
    """Convolution, BatchNorm, ReLU, and the input less what they find."""

    def __init__(self) -> None:
        super().__init__()
        middle = [nn.Conv2d(18, 18, 3, padding=1, bias=False), nn.BatchNorm2d(18), nn.ReLU()]
        self.body = nn.Sequential(nn.Conv2d(2, 18, 3, padding=1), nn.ReLU(), *middle, nn.Conv2d(18, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


def denoising(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.square().mean((1, 2, 3)) * (1 + targets)


def convolutional(*parts: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(features, 4))


def one_axis() -> nn.Module:
    return convolutional(
        nn.Conv1d(2, 6, 3),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Conv1d(6, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        features=15,
    )


def leaky() -> nn.Module:
    return convolutional(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.LeakyReLU(0.2),
        nn.Conv2d(5, 6, 3, stride=2, padding=1), nn.LeakyReLU(0.1), features=6 * 9,
    )  # fmt: skip


def without_norm() -> nn.Module:
    return convolutional(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 7, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        features=7 * 9,
    )  # fmt: skip


def overlapping() -> nn.Module:
    return convolutional(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5), nn.MaxPool2d(2, 1, ceil_mode=True), nn.ReLU(), features=20,
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "residual": (Residual, (2, 6, 6), F.cross_entropy),
    "dncnn": (DnCNN, (2, 6, 6), denoising),
    "one_axis": (one_axis, (2, 8), F.cross_entropy),
    "leaky": (leaky, (2, 6, 6), F.cross_entropy),
    "without_norm": (without_norm, (2, 6, 6), F.cross_entropy),
    "overlapping": (overlapping, (2, 6, 6), F.cross_entropy),
}


def problem(name: str, training: bool, batch: int = 19) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """A network in float32, its batch, and some coordinates of every parameter."""
    make, shape, _ = NETWORKS[name]
    torch.manual_seed(0)
    module = make().train(training)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight, 1, 0.3), nn.init.normal_(part.bias, 0, 0.3)
    inputs, targets = torch.randn(batch, *shape), torch.randint(4, (batch,))
    generator = torch.Generator().manual_seed(0)
    chosen = {n: torch.randperm(p.numel(), generator=generator)[:9] for n, p in module.named_parameters()}
    return module, inputs, targets, chosen


MEASURED = 1.2e-6
"""The largest ‖ĝ₃₂ − ĝ₆₄‖ of a parameter at μ = 5e-3, relative to the whole gradient."""


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_engine_agrees_with_reference(name: str, training: bool, arithmetic: str) -> None:
    module, inputs, targets, chosen = problem(name, training)
    loss = NETWORKS[name][2]
    assert prepare(module, inputs, targets, loss).untraced is None
    found = cge(module, inputs, targets, loss, coordinates=chosen).gradients
    wide = copy.deepcopy(module).double()
    exact = reference.cge(wide, inputs.double(), targets, loss, coordinates=chosen).gradients
    size = torch.cat([gradient.flatten() for gradient in exact.values()]).norm()
    for parameter, gradient in exact.items():
        error = ((found[parameter].double() - gradient).norm() / size).item()
        assert error < 3 * MEASURED, f"{parameter}: {error:.1e}"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_that_are_not_finite_give_no_gradient(name: str, value: float, arithmetic: str) -> None:
    """Where the reference has no number, neither has the engine."""
    module, inputs, targets, chosen = problem(name, training=True)
    first = next(iter(module.parameters()))
    with torch.no_grad():
        first.view(-1)[0] = value
    loss = NETWORKS[name][2]
    few = {parameter: indices[:2] for parameter, indices in chosen.items()}
    expected = reference.cge(module, inputs, targets, loss, coordinates=few).gradients
    found = cge(module, inputs, targets, loss, coordinates=few).gradients
    assert not expected[next(iter(chosen))].isfinite().all(), "or there is nothing to see"
    for parameter, gradient in expected.items():
        unknown = ~gradient.isfinite()
        assert not found[parameter][unknown].isfinite().any(), parameter


def test_the_number_of_threads_does_not_change_a_bit(threads: Iterator[None]) -> None:
    module, inputs, targets, chosen = problem("residual", training=True)
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(cge(module, inputs, targets, F.cross_entropy, coordinates=chosen).gradients)
    for parameter, gradient in found[0].items():
        assert torch.equal(gradient, found[1][parameter]), parameter


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads, back where it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_batch_that_fills_no_vector_takes_torch() -> None:
    """The engine is right on either side of the smallest batch that kernels take."""
    if build().library is None:
        pytest.skip(build().reason)
    taken = set()
    for batch in (3, 4, 7, 8, 15, 16, 17):
        module, inputs, targets, chosen = problem("overlapping", training=True, batch=batch)
        taken.add(kernels.suits(inputs[None]))
        few = {parameter: indices[:2] for parameter, indices in chosen.items()}
        found = cge(module, inputs, targets, F.cross_entropy, coordinates=few, mu=1e-3).gradients
        exact = reference.cge(
            copy.deepcopy(module).double(), inputs.double(), targets, F.cross_entropy, coordinates=few, mu=1e-3
        ).gradients
        for parameter, gradient in exact.items():
            torch.testing.assert_close(found[parameter].double(), gradient, rtol=1e-3, atol=1e-4)
    assert taken == {True, False}
