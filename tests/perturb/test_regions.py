"""Regions of the graph, run as programs of the kernels, against the slow reference; and the engine without them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Residual
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb import Chunk, engine
from deepzero_core.perturb.evaluator import prepare
from deepzero_core.perturb.native import program
from deepzero_core.perturb.native.build import build
from deepzero_core.perturb.objective import state_of
from deepzero_core.perturb.regions import Region


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


class Interrupted(nn.Module):
    """Operators that no program has between those that one has: regions begin again behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.second, self.third = nn.Conv2d(5, 6, 3), nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.scale = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.mish(self.norm(self.first(x))))
        x = F.relu(F.mish(self.third(F.relu(x))))
        x = x * torch.sigmoid(self.scale(x.mean((2, 3), keepdim=True)))
        return x.flatten(1)[:, :4]


class Shared(nn.Module):
    """One convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head(F.leaky_relu(self.again(F.relu(self.again(x))) - 0.5).mean((2, 3)))


class Displaced(nn.Module):
    """Sums of changes that are one channel each: the same one, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = F.relu(x + F.pad(x[:, :, 1:, ::1], (1, -1, 0, 1)))
        x = F.relu(F.pad(x, (0, 0, 0, 0, 2, 0)) + F.pad(x, (0, 0, 0, 0, 0, 2)))
        return self.head(x.mean((2, 3)))


class Modern(nn.Module):
    """An inverted residual block: depthwise in the middle, smooth activations, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.norm1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.project, self.norm3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.grouped, self.head = nn.Conv2d(6, 8, 3, groups=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm0(self.stem(x)))
        y = F.gelu(self.norm1(self.expand(x)))
        y = F.hardswish(self.norm2(self.depthwise(y)))
        x = F.avg_pool2d(x + self.norm3(self.project(y)), 2)
        return self.head(F.relu6(self.grouped(x)).mean((2, 3)))


def activated() -> nn.Module:
    return convolutional(
        nn.Conv2d(2, 5, 3, padding=1), nn.ELU(0.7), nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Sigmoid(),
        nn.MaxPool2d(2), nn.Conv2d(6, 5, 1), nn.GELU("tanh"), nn.AdaptiveAvgPool2d((1, 3)), nn.Tanh(), features=15,
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "residual": (Residual, (2, 6, 6), F.cross_entropy),
    "dncnn": (DnCNN, (2, 6, 6), denoising),
    "one_axis": (one_axis, (2, 8), F.cross_entropy),
    "leaky": (leaky, (2, 6, 6), F.cross_entropy),
    "without_norm": (without_norm, (2, 6, 6), F.cross_entropy),
    "overlapping": (overlapping, (2, 6, 6), F.cross_entropy),
    "interrupted": (Interrupted, (2, 7, 6), F.cross_entropy),
    "shared": (Shared, (2, 6, 6), F.cross_entropy),
    "displaced": (Displaced, (2, 6, 6), F.cross_entropy),
    "modern": (Modern, (2, 8, 8), F.cross_entropy),
    "activated": (activated, (2, 6, 6), F.cross_entropy),
}


def problem(name: str, training: bool, batch: int = 19) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor]]:
    """A network in float32, its batch, and some coordinates of every parameter."""
    make, shape, _ = NETWORKS[name]
    torch.manual_seed(0)
    module = make().train(training)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
            if part.affine:
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


@pytest.mark.parametrize("name", NETWORKS)
def test_the_size_of_a_chunk_does_not_change_a_bit_of_what_leaves_a_region(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of one perturbation, or all of them at once."""
    if build().library is None:
        pytest.skip(build().reason)
    module, inputs, targets, chosen = problem(name, training=True)
    loss, found = NETWORKS[name][2], []
    for cache in (0, 1 << 30):
        monkeypatch.setattr(program, "_CACHE", cache)
        found.append(cge(module, inputs, targets, loss, coordinates=chosen).gradients)
    for parameter, gradient in found[0].items():
        assert torch.equal(gradient, found[1][parameter]), parameter


def regions(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Region]]:
    """The regions that each parameter's coordinates pass, in order."""
    planned: dict[str, list[Region]] = {}
    plan = engine.plan

    def noted(*arguments: Any) -> Region | None:
        region = plan(*arguments)
        if region is not None:
            planned.setdefault(arguments[1][0].name, []).append(region)
        return region

    monkeypatch.setattr(engine, "plan", noted)
    module, inputs, targets, _ = problem(name, training=True)
    evaluator = prepare(module, inputs, targets, NETWORKS[name][2])
    base = evaluator.base(*state_of(module), inputs, targets)
    found = {}
    for parameter in dict(module.named_parameters()):
        planned.clear()
        evaluator.coordinates(base, Chunk(parameter, torch.zeros(1, dtype=torch.int64)), 1e-3)
        found[parameter] = [region for each in planned.values() for region in each]
    return found


def test_what_regions_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolutional network is one region from the parameter to the head; elsewhere they begin again."""
    if build().library is None:
        pytest.skip(build().reason)
    residual = regions("residual", monkeypatch)
    for parameter, found in residual.items():
        assert len(found) == (0 if parameter.startswith("head") else 1), parameter
        assert all(str(leaving.node.target) == "aten.mean.dim" for region in found for leaving in region.exits)
    for name in ("modern", "activated"):
        layers = {
            parameter: found for parameter, found in regions(name, monkeypatch).items() if "head" not in parameter
        }
        assert all(len(found) <= 1 for found in layers.values()), name
    interrupted = regions("interrupted", monkeypatch)
    assert [len(interrupted[f"{layer}.weight"]) for layer in ("first", "norm", "second", "third")] == [3, 3, 2, 2]
    assert [region.entry.thin for region in interrupted["first.weight"]] == [True, True, False]
    shared = regions("shared", monkeypatch)
    assert [len(shared[f"{layer}.weight"]) for layer in ("stem", "again")] == [1, 1]
    assert [str(leaving.node.target) for leaving in shared["again.weight"][0].exits] == ["aten.relu.default"]
    (displaced,) = regions("displaced", monkeypatch)["stem.weight"]
    assert [leaving.shift for leaving in displaced.exits] == [2, 0]


def test_the_paper_arithmetic_takes_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """`value` rounds every value: a program carries differences."""
    monkeypatch.setattr(engine, "plan", lambda *_: pytest.fail("a region was planned"))
    module, inputs, targets, chosen = problem("residual", training=True)
    evaluator = prepare(module, inputs, targets, F.cross_entropy)
    base = evaluator.base(*state_of(module), inputs, targets)
    evaluator.coordinates(base, Chunk("conv1.weight", chosen["conv1.weight"]), 1e-3, "value")


def test_a_batch_that_fills_half_a_slice_and_one_that_does_not() -> None:
    """The engine is right on either side of the smallest batch that programs take."""
    if build().library is None:
        pytest.skip(build().reason)
    taken = set()
    for batch in (1, 3, 4, 7, 8, 15, 16, 17):
        module, inputs, targets, chosen = problem("overlapping", training=batch > 1, batch=batch)
        taken.add(program.suits(inputs))
        few = {parameter: indices[:2] for parameter, indices in chosen.items()}
        found = cge(module, inputs, targets, F.cross_entropy, coordinates=few, mu=1e-3).gradients
        exact = reference.cge(
            copy.deepcopy(module).double(), inputs.double(), targets, F.cross_entropy, coordinates=few, mu=1e-3
        ).gradients
        for parameter, gradient in exact.items():
            torch.testing.assert_close(found[parameter].double(), gradient, rtol=1e-3, atol=1e-4)
    assert taken == {True, False}
