"""The engine against the slow reference, in float64, over a registry of layers and networks."""

import copy
import warnings

import pytest
import torch
from cases import LAYERS, NETWORKS, Case
from torch import nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb.evaluator import prepare

RTOL, ATOL = 1e-5, 1e-8


def assert_close(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL, msg=lambda text: f"{name}: {text}")


def assert_agrees(case: Case, *, training: bool, difference: str) -> None:
    module, inputs, targets = case.build()
    module.double().train(training)
    before = copy.deepcopy(module.state_dict())
    estimate = cge(module, inputs, targets, case.loss, difference=difference)
    expected = reference.cge(module, inputs, targets, case.loss, difference=difference)
    assert estimate.queries == expected.queries
    assert estimate.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            estimate.gradients[name], gradient, rtol=RTOL, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, buffer in expected.buffers.items():
        torch.testing.assert_close(estimate.buffers[name], buffer, rtol=0, atol=0)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was touched"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer_agrees_with_reference(case: Case, training: bool) -> None:
    assert_agrees(case, training=training, difference="forward")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_network_agrees_with_reference(case: Case, training: bool) -> None:
    assert_agrees(case, training=training, difference="forward")


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_network_agrees_with_reference_in_central_differences(case: Case) -> None:
    assert_agrees(case, training=True, difference="central")


@pytest.mark.parametrize("case", [*LAYERS, *NETWORKS], ids=str)
def test_registry_is_traced(case: Case) -> None:
    """The registry exercises the graph: a case that silently took one pass per query would test the reference twice."""
    module, inputs, targets = case.build()
    assert prepare(module.double(), inputs, targets, case.loss).untraced == case.untraced


class BranchOnValues(nn.Module):
    """Control flow that depends on the values of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -2 * y


class LeavesTorch(nn.Module):
    """A part that torch cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.linear(x).detach().numpy() ** 2)


class SelectsPositive(nn.Module):
    """The number of values that reach the loss depends on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y[y > 0].sum().expand(len(x), 1)


@pytest.mark.parametrize("kind", [BranchOnValues, LeavesTorch, SelectsPositive])
def test_untraceable_module_takes_one_pass_per_query_and_says_so(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind().double()
    inputs, targets = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="cannot be traced"):
        estimate = cge(module, inputs, targets, squared_sum)
    expected = reference.cge(module, inputs, targets, squared_sum)
    for name, gradient in expected.gradients.items():
        assert_close(name, estimate.gradients[name], gradient)


def squared_sum(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.sum(1, keepdim=True) - targets).square().mean()


def test_dropout_sees_the_same_masks_in_every_query() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(7, 6, dtype=torch.float64), torch.randint(3, (7,))
    torch.manual_seed(11)
    estimate = cge(module, inputs, targets, F.cross_entropy)
    after = torch.rand(1)
    torch.manual_seed(11)
    expected = reference.cge(module, inputs, targets, F.cross_entropy)
    assert torch.equal(after, torch.rand(1)), "one forward pass' worth of random numbers must be consumed"
    for name, gradient in expected.gradients.items():
        assert_close(name, estimate.gradients[name], gradient)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2)).double()
    inputs = torch.randn(batch, 2, 4, 4, dtype=torch.float64)
    targets = torch.randint(2, (batch,))
    estimate = cge(module, inputs, targets, summed_cross_entropy)
    expected = reference.cge(module, inputs, targets, summed_cross_entropy)
    for name, gradient in expected.gradients.items():
        assert_close(name, estimate.gradients[name], gradient)


def summed_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def test_inputs_may_be_non_contiguous() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    module.double()
    inputs = torch.randn(6, 8, 8, 3, dtype=torch.float64).permute(0, 3, 1, 2)
    targets = torch.randint(64, (6,))
    estimate = cge(module, inputs, targets, F.cross_entropy)
    expected = reference.cge(module, inputs, targets, F.cross_entropy)
    for name, gradient in expected.gradients.items():
        assert_close(name, estimate.gradients[name], gradient)


def test_chunking_does_not_change_the_estimate() -> None:
    case = next(case for case in NETWORKS if case.name == "residual")
    module, inputs, targets = case.build()
    module.double()
    whole = cge(module, inputs, targets, case.loss, memory=1 << 30)
    tiny = cge(module, inputs, targets, case.loss, memory=1)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(tiny.gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_no_warning_for_a_traceable_network() -> None:
    case = next(case for case in NETWORKS if case.name == "residual")
    module, inputs, targets = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(module.double(), inputs, targets, case.loss)
