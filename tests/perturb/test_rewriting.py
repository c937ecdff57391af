"""Rewritten graphs: which operators they consist of, and that the estimate stays that of the reference."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb.objective import state_of
from deepzero_core.perturb.rewriting.attention import attend
from deepzero_core.perturb.rewriting.feed_forward import feed_forward
from deepzero_core.perturb.trace import Trace, trace

BATCH, TOKENS, WIDTH, HEADS = 3, 5, 4, 2
aten = torch.ops.aten


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets.sum()).square().mean()


class Block(nn.Module):
    """x [B, T, W] → x + attention(x), then x + mlp(x), of which `read` takes what is returned."""

    def __init__(
        self, read: Callable[[Tensor], Tensor], causal: bool = False, weights: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.read, self.causal, self.weights, self.dropout = read, causal, weights, dropout
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        shares = (q @ k.mT).softmax(-1) if self.weights else None
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + mixed.transpose(1, 2).flatten(2)
        x = F.dropout(x, self.dropout, self.training)
        found = self.read(x + self.mlp(x))
        return found if shares is None else found + shares.square().mean()


@dataclass(frozen=True)
class Case:
    """How many tokens of all examples the attention gives, and the feed-forward layers."""

    name: str
    attended: int
    fed: int
    read: Callable[[Tensor], Tensor]
    options: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        return Block(self.read, **self.options), torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH)


def case(name: str, tokens: int, read: Callable[[Tensor], Tensor], attended: int | None = None, **options: Any) -> Case:
    """`tokens`: of every example, of the attention too unless `attended` says otherwise."""
    return Case(name, BATCH * (tokens if attended is None else attended), BATCH * tokens, read, options)


CASES = [
    case("first_token", 1, lambda y: y[:, 0]),
    case("last_token", 1, lambda y: y[:, -1]),
    case("a_few_tokens", 3, lambda y: y[:, 1:4]),
    case("the_last_tokens", 2, lambda y: y[:, 3:]),
    case("one_twice", 1, lambda y: y[:, 1] * y[:, 1].tanh()),
    case("behind_a_transpose", 2, lambda y: y.transpose(1, 2)[:, :, 1:3]),
    case("behind_a_softmax", 2, lambda y: y.softmax(2)[:, :2]),
    case("behind_a_reshape", 2, lambda y: y.reshape(BATCH, TOKENS, 2, 2).exp()[:, 2:4]),
    case("causal", 2, lambda y: y[:, 2:4], causal=True),
    case("two_different_tokens", TOKENS, lambda y: y[:, 0] * y[:, 1]),
    case("every_other_token", TOKENS, lambda y: y[:, ::2]),
    case("softmax_along_tokens", TOKENS, lambda y: y.softmax(1)[:, 0]),
    case("mean_of_tokens", TOKENS, lambda y: y.mean(1)),
    case("part_of_a_feature_axis", TOKENS, lambda y: y[:, :, 1:3]),
    Case("one_example", TOKENS, TOKENS, lambda y: y[1:2], {}),
    case("weights_read_too", 1, lambda y: y[:, 0], weights=True),
    case("dropout", 1, lambda y: y[:, 0], attended=TOKENS, dropout=0.3),
]


def traced(case: Case) -> Trace:
    module, inputs, targets = case.build()
    return trace(module, *state_of(module), inputs, targets, squared)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rewritten_graphs_agree_with_reference(case: Case) -> None:
    module, inputs, targets = case.build()
    problem = module.double(), inputs.double(), targets.double(), squared
    torch.manual_seed(1)
    expected = reference.cge(*problem)
    torch.manual_seed(1)
    found = cge(*problem)
    assert torch.allclose(torch.tensor(found.loss), torch.tensor(expected.loss))
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_the_rows_that_are_read_are_computed(case: Case) -> None:
    graph = traced(case).graph
    sizes: dict[Any, int] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.target in (attend, feed_forward):
                sizes[n.target] = value.numel() // WIDTH
            return value

    module, inputs, targets = case.build()
    parameters, buffers = state_of(module)
    Watch(graph).run([*parameters.values()], [*buffers.values()], inputs, targets)
    assert sizes[feed_forward] == case.fed
    if case.options.get("causal"):  # a masked softmax is not taken together with its products
        assert attend not in sizes
    else:
        assert sizes[attend] == case.attended


def targets_of(module: nn.Module, *shape: int) -> Counter[Any]:
    found = trace(module, *state_of(module), torch.randn(shape), torch.randn(shape[0]), squared)
    return Counter(node.target for node in found.nodes)


def test_attention_of_torch_is_one_operator() -> None:
    class Attention(nn.Module):
        def __init__(self, weights: bool) -> None:
            super().__init__()
            self.inner, self.weights = nn.MultiheadAttention(4, 2, batch_first=True), weights

        def forward(self, x: Tensor) -> Tensor:
            mixed, shares = self.inner(x, x, x, need_weights=self.weights)
            return mixed if shares is None else mixed * shares.sum()

    alone, returned = (targets_of(Attention(weights), 3, 5, 4) for weights in (False, True))
    assert alone[attend] == 1
    assert not alone[aten._softmax.default] + alone[aten._safe_softmax.default]
    assert not returned[attend]


@pytest.mark.parametrize("function", [nn.GELU(), nn.SiLU(), nn.Tanh()], ids=lambda f: type(f).__name__)
def test_two_linear_layers_are_one_operator(function: nn.Module) -> None:
    found = targets_of(nn.Sequential(nn.Linear(4, 6), function, nn.Linear(6, 3)), 5, 4)
    assert found[feed_forward] == 1
    assert not found[aten.addmm.default]


def test_a_hidden_layer_that_is_read_elsewhere_stays() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out_of = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.into(x).tanh()
            return hidden + self.out_of(hidden)

    assert not targets_of(Skipping(), 5, 4)[feed_forward]


def test_float32_differences_stay_exact_with_kernels_and_without(arithmetic: str) -> None:
    """At a step that no float32 loss resolves."""
    for example in CASES[:3]:
        problem = *example.build(), squared
        wide = copy.deepcopy(problem[0]).double(), *(part.double() for part in problem[1:3]), squared
        found, exact = (cge(*one, mu=1e-5).gradients for one in (problem, wide))
        for name, gradient in exact.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, (example.name, name)


def test_large_steps_with_kernels_and_without(arithmetic: str) -> None:
    """Beyond what the series and polynomials of the kernels hold for."""
    problem = *CASES[0].build(), squared
    wide = copy.deepcopy(problem[0]).double(), *(part.double() for part in problem[1:3]), squared
    found, exact = (cge(*one, mu=5.0).gradients for one in (problem, wide))
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-4, atol=1e-5)
