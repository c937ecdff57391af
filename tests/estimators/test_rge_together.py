"""Several directions in one pass: the same estimate as one after the other, and one after the other where needed."""

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import reference, rge
from deepzero_core.models import build_model


class Noted(nn.Module):
    """A module, and how often it was run; it remembers its last features."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.runs, self.features = inner, [], None

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(1)
        self.features = self.inner(x)
        return self.features


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x.unflatten(1, (2, 4))).mean(1))


class Branching(nn.Module):
    """Control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -2 * y


class LeavesTorch(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(self.linear(x).detach().numpy()))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(27, 3),
    )  # fmt: skip


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    module[1].requires_grad_(False)
    return module


TOGETHER = {
    "linear": lambda: nn.Linear(8, 3),
    "perceptron": lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
    "images": images,
    "attention": Attention,
    "frozen": frozen,
    "nothing_to_train": lambda: nn.Linear(8, 3).requires_grad_(False),
    "spectral": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Linear(4, 3)),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(8, 3), nn.Tanh()), backend="eager"),
}
# In training mode; the order in which dropout draws depends on how directions lie in memory.
DRAWING = {"images", "attention"}
ALONE = {
    "branching": Branching,
    "leaves_torch": LeavesTorch,
}


def per_example(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def problem(module: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return module.double(), torch.randn(5, 8, dtype=torch.float64), torch.randint(3, (5,))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def assert_is_the_reference(module: nn.Module, inputs: Tensor, targets: Tensor, **settings: object) -> None:
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(5)
    found = rge(module, inputs, targets, per_example, generator=seeded(), **settings)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    expected = reference.rge(module, inputs, targets, per_example, generator=seeded(), **settings)
    assert torch.equal(after, torch.get_rng_state()), "one forward pass' worth of random numbers must be consumed"
    assert found.queries == expected.queries
    assert found.loss == expected.loss
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-7, atol=1e-10)
    for name, buffer in expected.buffers.items():
        assert torch.equal(found.buffers[name], buffer)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was touched"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("name", TOGETHER)
def test_directions_together_agree_with_reference(name: str, difference: str, training: bool) -> None:
    torch.manual_seed(2)
    noted = Noted(TOGETHER[name]()).train(training)
    module, inputs, targets = problem(noted)
    assert_is_the_reference(module, inputs, targets, queries=9, mu=1e-3, difference=difference)
    noted.runs.clear()
    estimate = rge(module, inputs, targets, per_example, queries=9, generator=seeded(), difference=difference)
    passes = 2 if difference == "central" else 1
    alone = name == "nothing_to_train" or (training and name in DRAWING)
    assert len(noted.runs) == 1 + passes * (9 if alone else 1)
    if not alone:
        assert torch.equal(noted.features, estimate.outputs), "what the module keeps is a batched stand-in"


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_batched_is_run_alone_with_a_warning_and_right(name: str) -> None:
    torch.manual_seed(2)
    module, inputs, targets = problem(ALONE[name]())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_is_the_reference(module, inputs, targets, queries=9)
    said = [str(warning.message) for warning in caught if "cannot be traced for several" in str(warning.message)]
    assert len(said) == 1
    assert said[0].endswith("one forward pass per query")


def test_an_error_of_the_module_arrives() -> None:
    def failing(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(failed) > 1:
            raise RuntimeError("out of order")
        failed.append(1)
        return per_example(outputs, targets)

    failed = [1]
    module, inputs, targets = problem(nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="out of order"), pytest.raises(RuntimeError, match="out of order"):
        rge(module, inputs, targets, failing, queries=9, generator=seeded())


def test_statistics_are_those_of_each_direction_and_not_of_all() -> None:
    """Whatever comes before it, what BatchNorm puts out has the mean square 1 under statistics of its own."""
    module, inputs, targets = problem(
        nn.Sequential(nn.Linear(8, 3, bias=False), nn.BatchNorm1d(3, eps=1e-20, affine=False))
    )
    found = rge(module, inputs, targets, lambda y, _: y.square().sum() / 15, queries=16, mu=0.1, generator=seeded())
    assert found.loss == pytest.approx(1)
    assert found.gradients["0.weight"].abs().max() < 1e-12


@pytest.mark.parametrize("memory", [1, 40_000, 1 << 40])
def test_memory_changes_the_passes_and_not_the_estimate(memory: int) -> None:
    noted = Noted(images().eval())
    module, inputs, targets = problem(noted)
    runs, estimates = {}, {}
    for given in (memory, 1):
        noted.runs.clear()
        torch.manual_seed(3)
        estimate = rge(module, inputs, targets, per_example, queries=20, generator=seeded(), memory=given)
        estimates[given], runs[given] = estimate.gradients, len(noted.runs)
    for name, gradient in estimates[1].items():
        torch.testing.assert_close(estimates[memory][name], gradient, rtol=1e-7, atol=1e-10)
    assert runs[1] == 1 + 20
    fewest, most = {1: (21, 21), 40_000: (3, 6), 1 << 40: (2, 2)}[memory]
    assert fewest <= runs[memory] <= most


def test_a_large_batch_is_run_alone() -> None:
    """What does not fit into the cache of a CPU is slower together: see the table of `rge`."""
    noted = Noted(build_model("cnn", in_channels=3, num_classes=10, image_size=32, depth=2, width=18, seed=0))
    rge(noted, torch.randn(16, 3, 32, 32), torch.randint(10, (16,)), per_example, queries=4, generator=seeded())
    assert len(noted.runs) == 1 + 4


class InFloat64(nn.Module):
    """The same parameters in float32, and everything that is made of them in float64."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        parameters = {name: value.double() for name, value in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, parameters, (x.double(),))


def test_one_loss_per_example_is_the_more_exact() -> None:
    """Against the same directions in float64 the relative error is 5e-4 where the loss takes the mean, 6e-5 here."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    inputs, targets = torch.randn(128, 64), torch.randint(10, (128,))

    def estimate(module: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        found = rge(module, inputs, targets, loss_fn, queries=24, mu=1e-3, generator=seeded())
        return torch.cat([gradient.flatten() for gradient in found.gradients.values()])

    true = estimate(InFloat64(module), per_example)
    mean, each = ((estimate(module, loss) - true).norm() / true.norm() for loss in (F.cross_entropy, per_example))
    assert each < 1.8e-4
    assert each < mean / 3
