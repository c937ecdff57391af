"""What every estimator promises: it only reads the module, counts its queries, and says what a request lacks."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deepzero_core import GradientEstimate, cge, first_order, forward_gradient, reference, rge
from deepzero_core.errors import RequestError
from deepzero_core.perturb.evaluator import prepare

Loss = Callable[[Any, Tensor], Tensor]
Estimator = Callable[[nn.Module, Tensor, Tensor, Loss], GradientEstimate]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


ESTIMATORS: dict[str, Estimator] = {
    "cge": cge,
    "cge_central": lambda *args: cge(*args, difference="central"),
    "reference_cge": reference.cge,
    "rge": lambda *args: rge(*args, queries=3, generator=seeded()),
    "forward_gradient": lambda *args: forward_gradient(*args, queries=3, generator=seeded()),
    "first_order": first_order,
}


class Network(nn.Module):
    """Running statistics, a buffer of its own, a frozen layer, a part in eval mode, a shared weight."""

    def __init__(self, traceable: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.frozen, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.tied.weight = self.first.weight
        self.quiet = nn.BatchNorm1d(4).eval()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y = self.quiet(torch.relu(self.norm(self.first(x))))
        if not self.traceable and y.detach().sum().item() > 1e9:
            return y
        return self.tied(self.frozen(y))


def problem(traceable: bool = True) -> tuple[Network, Tensor, Tensor]:
    torch.manual_seed(0)
    module = Network(traceable)
    module.first.weight.grad = torch.ones(4, 4)
    return module, torch.randn(6, 4), torch.randint(4, (6,))


def snapshot(module: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: (value.data_ptr(), value.clone()) for name, value in module.state_dict().items()},
        "versions": {name: value._version for name, value in module.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "requires_grad": {name: value.requires_grad for name, value in module.named_parameters()},
        "training": {name: part.training for name, part in module.named_modules()},
        "hooks": {name: len(part._forward_hooks) for name, part in module.named_modules()},
    }


def assert_untouched(module: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(module)
    for name, (place, value) in before["tensors"].items():
        assert after["tensors"][name][0] == place, f"{name} is another tensor"
        assert torch.equal(after["tensors"][name][1], value), f"{name} has changed"
    for name, gradient in before["grads"].items():
        assert (gradient is None) == (after["grads"][name] is None)
        assert gradient is None or torch.equal(after["grads"][name], gradient)
    for what in ("versions", "requires_grad", "training", "hooks"):
        assert after[what] == before[what]
    assert all(type(value) is nn.Parameter for value in module.parameters())


@pytest.mark.filterwarnings("ignore:Network cannot be traced")
@pytest.mark.parametrize("traceable", [True, False], ids=["traced", "untraced"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_module_and_global_generator_are_only_read(name: str, traceable: bool) -> None:
    if name == "forward_gradient" and not traceable:
        pytest.skip("`.item()` has no forward-mode derivative in torch")
    module, inputs, targets = problem(traceable)
    before, given, random_state = snapshot(module), inputs.clone(), torch.get_rng_state()
    estimate = ESTIMATORS[name](module, inputs, targets, F.cross_entropy)
    assert_untouched(module, before)
    assert torch.equal(inputs, given)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(gradient.requires_grad for gradient in estimate.gradients.values())
    assert not any(buffer.requires_grad for buffer in estimate.buffers.values())
    assert not estimate.outputs.requires_grad
    assert estimate.buffers["seen"] == 1, "the returned buffers are those of one forward pass"


class Failing:
    """A loss that raises after some calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ArithmeticError("the loss went wrong")
        return F.cross_entropy(outputs, targets)


@pytest.mark.filterwarnings("ignore:Network cannot be traced")
@pytest.mark.parametrize("traceable", [True, False], ids=["traced", "untraced"])
@pytest.mark.parametrize("calls", [0, 1, 2, 4])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_module_is_left_alone_when_the_loss_raises(name: str, calls: int, traceable: bool) -> None:
    module, inputs, targets = problem(traceable)
    before, random_state = snapshot(module), torch.get_rng_state()
    failed = False
    try:
        ESTIMATORS[name](module, inputs, targets, Failing(calls))
    except ArithmeticError:
        failed = True
    except RuntimeError:
        assert name == "forward_gradient"  # `.item()` under forward-mode differentiation
        assert not traceable
    assert failed or calls > 0, "the user's own error must arrive"
    assert_untouched(module, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(module(inputs), copy.deepcopy(module)(inputs))


def test_queries_are_counted() -> None:
    module, inputs, targets = problem()
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    some = {"first.bias": torch.tensor([0, 2]), "norm.weight": torch.tensor([True, False, True, True])}
    arguments = (module, inputs, targets, F.cross_entropy)
    assert cge(*arguments).queries == 1 + trainable
    assert cge(*arguments, difference="central").queries == 1 + 2 * trainable
    assert cge(*arguments, coordinates=some).queries == 1 + 5
    assert cge(*arguments, coordinates=some, difference="central").queries == 1 + 10
    assert cge(*arguments, coordinates={}).queries == 1
    assert first_order(*arguments).queries == 1


def test_only_the_coordinates_asked_for_are_estimated() -> None:
    module, inputs, targets = problem()
    whole = cge(module, inputs, targets, F.cross_entropy).gradients
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = mask[3, 0] = True
    chosen = {"first.weight": mask, "tied.bias": torch.tensor([3, 0, 3]), "norm.bias": torch.tensor([], dtype=int)}
    part = cge(module, inputs, targets, F.cross_entropy, coordinates=chosen)
    assert part.queries == 1 + 4, "an index named twice is asked for once"
    expected = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    expected["first.weight"][mask] = whole["first.weight"][mask]
    expected["tied.bias"][[0, 3]] = whole["tied.bias"][[0, 3]]
    assert part.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(part.gradients[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_frozen_parameters_have_gradient_zero(name: str) -> None:
    module, inputs, targets = problem()
    gradients = ESTIMATORS[name](module, inputs, targets, F.cross_entropy).gradients
    assert "tied.weight" not in gradients, "a shared parameter has one entry, under its first name"
    for parameter in ("frozen.weight", "frozen.bias"):
        assert not gradients[parameter].any()
    for parameter in ("first.weight", "norm.weight", "tied.bias"):
        assert gradients[parameter].abs().max() > 1e-4


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_to_train(name: str) -> None:
    module, inputs, targets = problem()
    module.requires_grad_(False)
    gradients = ESTIMATORS[name](module, inputs, targets, F.cross_entropy).gradients
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_loss_that_depends_on_nothing(name: str) -> None:
    module, inputs, targets = problem()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be traced")
        estimate = ESTIMATORS[name](module, inputs, targets, lambda outputs, t: outputs.new_tensor(2.0))
    assert estimate.loss == 2.0
    assert not any(gradient.any() for gradient in estimate.gradients.values())


def test_shared_parameters_count_in_every_place() -> None:
    module, inputs, targets = problem()
    module, inputs = module.double(), inputs.double()
    exact = first_order(module, inputs, targets, F.cross_entropy).gradients["first.weight"]
    found = cge(module, inputs, targets, F.cross_entropy, mu=1e-6, difference="central").gradients["first.weight"]
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "mu_zero": ({"mu": 0.0}, "mu must be positive"),
    "mu_negative": ({"mu": -1e-3}, "mu must be positive"),
    "mu_nan": ({"mu": float("nan")}, "mu must be positive"),
    "mu_infinite": ({"mu": float("inf")}, "mu must be positive and finite"),
    "difference": ({"difference": "centrl"}, "unknown difference 'centrl': did you mean 'central'"),
    "precision": ({"precision": "float3"}, "unknown precision 'float3': did you mean 'float32'"),
    "name": ({"coordinates": {"first.wieght": torch.tensor([0])}}, "'first.wieght': did you mean 'first.weight'"),
    "mask_shape": ({"coordinates": {"first.weight": torch.ones(4, dtype=torch.bool)}}, r"shape \(4,\).*\(4, 4\)"),
    "index_high": ({"coordinates": {"first.bias": torch.tensor([1, 4])}}, "reach from 1 to 4, valid are 0 to 3"),
    "index_low": ({"coordinates": {"first.bias": torch.tensor([-1])}}, "reach from -1 to -1, valid are 0 to 3"),
    "index_float": ({"coordinates": {"first.bias": torch.tensor([1.0])}}, "boolean mask of shape.*not torch.float32"),
    "index_2d": ({"coordinates": {"first.weight": torch.ones(4, 4, dtype=torch.long)}}, r"int64 of shape \(4, 4\)"),
    # Neither a mask nor indices for certain: [1, 0, 1, 1] means different coordinates as either.
    "index_uint8": ({"coordinates": {"first.bias": torch.ones(4, dtype=torch.uint8)}}, "not torch.uint8"),
}


@pytest.mark.parametrize("estimator", [cge, reference.cge], ids=["engine", "reference"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(estimator: Callable[..., GradientEstimate], name: str) -> None:
    module, inputs, targets = problem()
    arguments, message = MISTAKES[name]
    with pytest.raises(RequestError, match=message):
        estimator(module, inputs, targets, F.cross_entropy, **arguments)


@pytest.mark.parametrize("queries", [0, -3])
def test_no_direction_is_a_mistake(queries: int) -> None:
    module, inputs, targets = problem()
    with pytest.raises(RequestError, match="at least 1"):
        rge(module, inputs, targets, F.cross_entropy, queries=queries, generator=seeded())
    with pytest.raises(RequestError, match="at least 1"):
        forward_gradient(module, inputs, targets, F.cross_entropy, queries=queries, generator=seeded())
    with pytest.raises(RequestError, match="mu must be positive"):
        rge(module, inputs, targets, F.cross_entropy, queries=2, mu=0, generator=seeded())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_losses_per_example_are_averaged(name: str) -> None:
    module, inputs, targets = problem()
    mean = ESTIMATORS[name](module, inputs, targets, F.cross_entropy)
    each = ESTIMATORS[name](module, inputs, targets, lambda y, t: F.cross_entropy(y, t, reduction="none"))
    assert each.loss == pytest.approx(mean.loss, rel=1e-6)
    for parameter, gradient in mean.gradients.items():
        torch.testing.assert_close(each.gradients[parameter], gradient, rtol=1e-4, atol=1e-4)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"class": self.left(x), "rest": (self.right(x), x)}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_outputs_may_have_any_structure(name: str) -> None:
    torch.manual_seed(0)
    module, inputs, targets = Several(), torch.randn(5, 4), torch.randint(3, (5,))
    estimate = ESTIMATORS[name](
        module, inputs, targets, lambda y, t: F.cross_entropy(y["class"], t) + y["rest"][0].square().mean()
    )
    expected = module(inputs)
    torch.testing.assert_close(estimate.outputs["class"], expected["class"].detach())
    torch.testing.assert_close(estimate.outputs["rest"], (expected["rest"][0].detach(), inputs))


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, Tensor):
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return result


BUDGETED: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ),
        torch.randn(4, 3, 12, 12),
    ),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(300, 8), nn.Flatten(), nn.Linear(16, 3)), torch.randint(300, (4, 2)),
    ),
    # Its weight spreads out one channel of the result for every perturbation.
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(2, 8, 2, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUDGETED)
def test_memory_budget_bounds_every_tensor(name: str) -> None:
    torch.manual_seed(0)
    module, inputs = BUDGETED[name]()
    targets, memory = torch.randint(3, (len(inputs),)), 1 << 17
    evaluator = prepare(module, inputs, targets, F.cross_entropy)
    whole = sum(parameter.numel() for parameter in module.parameters())
    with Largest() as largest:
        base = evaluator.base(
            {n: p.detach() for n, p in module.named_parameters()}, dict(module.named_buffers()), inputs, targets
        )
        sizes = [evaluator.chunk_size(base, n, memory) for n, _ in module.named_parameters()]
        small = cge(module, inputs, targets, F.cross_entropy, memory=memory, evaluator=evaluator)
    assert min(sizes) < whole, "the budget binds"
    # A rule may hold a value and its change, or a sum of both, beside what is counted.
    assert largest.bytes <= 2 * memory
    large = cge(module, inputs, targets, F.cross_entropy, memory=1 << 30, evaluator=evaluator)
    for parameter, gradient in large.gradients.items():
        torch.testing.assert_close(small.gradients[parameter], gradient, rtol=1e-4, atol=1e-6)


def test_evaluator_is_reused_with_new_values() -> None:
    module, inputs, targets = problem()
    evaluator = prepare(module, inputs, targets, F.cross_entropy)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3)
        module.norm.running_mean.fill_(0.2)
    others = torch.randn(6, 4)
    kept = cge(module, others, targets, F.cross_entropy, evaluator=evaluator)
    fresh = cge(module, others, targets, F.cross_entropy)
    assert kept.loss == fresh.loss
    for name, gradient in fresh.gradients.items():
        assert torch.equal(kept.gradients[name], gradient)
    for name, buffer in fresh.buffers.items():
        assert torch.equal(kept.buffers[name], buffer)


def test_an_evaluator_is_refused_for_another_mode_shape_or_loss() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    inputs, targets = torch.randn(6, 4), torch.randint(2, (6,))
    evaluator = prepare(module, inputs, targets, F.cross_entropy)
    assert cge(module, inputs, targets, F.cross_entropy, evaluator=evaluator).queries > 1
    with pytest.raises(RequestError, match="prepared for another"):
        cge(module, inputs[:5], targets[:5], F.cross_entropy, evaluator=evaluator)
    with pytest.raises(RequestError, match="prepared for another"):
        cge(module, inputs, targets, F.multi_margin_loss, evaluator=evaluator)
    with pytest.raises(RequestError, match="prepared for another"):
        cge(module.eval(), inputs, targets, F.cross_entropy, evaluator=evaluator)
