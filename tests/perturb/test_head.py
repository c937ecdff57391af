"""The closed forms of the last layer and the last normalisation against one forward pass per coordinate."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb.objective import state_of
from deepzero_core.perturb.rewriting.head import linear_cross_entropy
from deepzero_core.perturb.rules import head
from deepzero_core.perturb.trace import trace

BATCH, CLASSES = 6, 5


class Read(nn.Module):
    """Layers, and then one token, a mean over space, or all there is."""

    def __init__(self, read: Callable[[Tensor], Tensor], features: int, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.read, self.head = nn.Sequential(*layers), read, nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.layers(x)))


def mean_over_space(y: Tensor) -> Tensor:
    return y.mean((2, 3))


def pooled(y: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(F.gelu(y), 1).flatten(1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer_norm_of_tokens": (lambda: Read(lambda y: y[:, 0], 4, nn.Linear(3, 4), nn.LayerNorm(4)), (2, 3)),
    "rms_norm": (lambda: Read(torch.tanh, 4, nn.Linear(3, 4), nn.RMSNorm(4)), (3,)),
    "batch_norm": (lambda: Read(mean_over_space, 4, nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU()), (2, 4, 4)),
    "group_norm": (lambda: Read(pooled, 4, nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4)), (2, 4, 4)),
    "batch_norm_1d": (lambda: Read(F.relu, 4, nn.Linear(3, 4), nn.BatchNorm1d(4)), (3,)),
}

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": F.cross_entropy,
    "each": partial(F.cross_entropy, reduction="none"),
    "sum": partial(F.cross_entropy, reduction="sum"),
    "ignored": lambda y, t: F.cross_entropy(y, t, ignore_index=2),
    "weighted": lambda y, t: F.cross_entropy(y, t, torch.arange(1.0, 1 + CLASSES).to(y), ignore_index=1),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    return make().double(), torch.randn(BATCH, *shape, dtype=torch.float64), torch.arange(BATCH) % CLASSES


def in_the_end(module: nn.Module) -> dict[str, Tensor]:
    """Every coordinate of the last normalisation and the last layer."""
    found = {n: torch.arange(p.numel()) for n, p in module.named_parameters() if n.startswith(("layers.1", "head"))}
    assert len(found) in (3, 4)
    return found


@pytest.mark.parametrize("mu", [1e-3, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_closed_forms(name: str, loss: str, mu: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, targets = problem(name)
    given: Any = (module, inputs, targets, LOSSES[loss])
    coordinates = in_the_end(module)
    expected = reference.cge(*given, mu=mu, coordinates=coordinates).gradients
    others = cge(*given, mu=mu).gradients
    if mu < 0.1:
        monkeypatch.setattr(head, "_one_after_the_other", lambda _: pytest.fail("no closed form"))
    found = cge(*given, mu=mu, coordinates=coordinates).gradients
    for parameter in coordinates:
        torch.testing.assert_close(found[parameter], expected[parameter], rtol=1e-6, atol=1e-10)
    for parameter, gradient in reference.cge(*given, mu=mu).gradients.items():
        torch.testing.assert_close(others[parameter], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mu", [1e-6, 1e-3, 3e-2, 0.2, 20.0])
def test_digits_of_float32(mu: float) -> None:
    """Every number of terms, and changes that are too large for any."""
    wide, inputs, targets = problem("batch_norm_1d")
    module, coordinates = copy.deepcopy(wide).float(), in_the_end(wide)
    found = cge(module, inputs.float(), targets, F.cross_entropy, mu=mu, coordinates=coordinates).gradients
    wide = copy.deepcopy(module).double()
    exact = cge(wide, inputs.float().double(), targets, F.cross_entropy, mu=mu, coordinates=coordinates).gradients
    for parameter in coordinates:
        assert (found[parameter].double() - exact[parameter]).norm() < 2e-6 * exact[parameter].norm(), parameter


def test_where_the_graph_has_the_operator() -> None:
    """Not behind other losses, other axes or a temperature."""
    module, inputs, targets = problem("rms_norm")

    def fused(loss: Callable[[Tensor, Tensor], Tensor]) -> int:
        nodes = trace(module, *state_of(module), inputs, targets, loss).nodes
        return sum(node.target is linear_cross_entropy for node in nodes)

    assert fused(F.cross_entropy) == 1
    assert fused(lambda y, t: F.nll_loss(y.log_softmax(-1), t)) == 1
    assert fused(lambda y, t: F.cross_entropy(y / 2, t)) == 0
    assert fused(lambda y, t: F.nll_loss(y.log_softmax(0), t)) == 0
    assert fused(lambda y, t: F.cross_entropy(y, t, label_smoothing=0.1)) == 0
