"""The engine against the slow reference, in float64, over a registry of layers and networks."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LAYERS, NETWORKS, Case
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import GradientEstimate, cge, reference
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


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer_agrees_with_reference(case: Case) -> None:
    assert_agrees(case, training=True, difference="forward")


WITH_MODES = (nn.modules.batchnorm._NormBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)


@pytest.mark.parametrize(
    "case", [case for case in LAYERS if any(isinstance(m, WITH_MODES) for m in case.make().modules())], ids=str
)
def test_layer_agrees_with_reference_in_evaluation_mode(case: Case) -> None:
    assert_agrees(case, training=False, difference="forward")


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


REGISTRY = [*LAYERS, *NETWORKS]


def outcome(estimator: Callable[..., GradientEstimate], case: Case, inputs: Tensor, targets: Tensor) -> Any:
    """Gradients of a few coordinates that the loss reads, or the type of what is raised."""
    module, _, _ = case.build()
    few = {name: torch.arange(min(3, p.numel())) for name, p in module.named_parameters() if name != "unused"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about batches of this size
        try:
            return estimator(module.double(), inputs, targets, case.loss, coordinates=few).gradients
        except (RuntimeError, ValueError, IndexError) as error:
            return type(error)


def assert_same_outcome(case: Case, inputs: Tensor, targets: Tensor) -> None:
    found, expected = (outcome(estimator, case, inputs, targets) for estimator in (cge, reference.cge))
    if isinstance(expected, type):
        assert found is expected
        return
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=RTOL, atol=ATOL, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("case", REGISTRY[::3], ids=str)
def test_no_examples(case: Case) -> None:
    """The mean over nothing is NaN; what an operator refuses, it refuses here too."""
    _, inputs, targets = case.build()
    assert_same_outcome(case, inputs[:0], targets[:0])


@pytest.mark.parametrize("case", REGISTRY[1::3], ids=str)
def test_one_example(case: Case) -> None:
    _, inputs, targets = case.build()
    assert_same_outcome(case, inputs[:1], targets[:1])


def strided(tensor: Tensor) -> Tensor:
    every_second = tuple(slice(None, None, 2) for _ in tensor.shape)
    spread = tensor.new_full([2 * length for length in tensor.shape], torch.nan)
    spread[every_second] = tensor
    return spread[every_second]


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    strided,
    lambda tensor: tensor[:1].expand(tensor.shape),
]


@pytest.mark.parametrize("place", range(2, len(REGISTRY), 3), ids=lambda place: str(REGISTRY[place]))
def test_inputs_of_any_layout(place: int) -> None:
    """Transposed, with gaps, one example repeated without memory: the cases take turns."""
    case = REGISTRY[place]
    _, inputs, targets = case.build()
    assert_same_outcome(case, LAYOUTS[place // 3 % 3](inputs), targets)


# No kernel of this type, or gradients that bfloat16 does not resolve at all.
BEYOND_BFLOAT16 = {"linear_rounded", "conv_local_response"}


@pytest.mark.parametrize("case", [case for case in REGISTRY[::3] if case.name not in BEYOND_BFLOAT16], ids=str)
def test_bfloat16_modules(case: Case) -> None:
    """They run, and point where float64 points."""
    module, inputs, targets = case.build()
    targets = targets.bfloat16() if targets.is_floating_point() else targets
    few = {name: torch.arange(min(6, p.numel())) for name, p in module.named_parameters()}
    module.bfloat16()
    found = cge(module, inputs.bfloat16(), targets, case.loss, mu=2e-2, coordinates=few).gradients
    targets = targets.double() if targets.is_floating_point() else targets
    exact = cge(module.double(), inputs.bfloat16().double(), targets, case.loss, mu=2e-2, coordinates=few).gradients
    a, b = (torch.cat([g.double().flatten() for g in gradients.values()]) for gradients in (found, exact))
    assert F.cosine_similarity(a, b, 0) > 0.9


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches_of_a_sum(batch: int) -> None:
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
