"""Every registered rule is exercised by the registry of cases, and none is registered twice."""

# ruff: noqa: E501  (a registry: one case, one line)

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import LAYERS, NETWORKS, Apply, Case, after_conv, after_linear, layer
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb.changes import Block, Change, OneHot, dense
from deepzero_core.perturb.rules import general, registry, rule, transposed
from deepzero_core.perturb.rules.elementwise import rule_for


def select_written(y: Tensor) -> Tensor:
    z = y.clone()
    z[:, 1] = 2 * y[:, 0]
    return z


def square_channels(y: Tensor) -> Tensor:
    """[B, 4, 6, 6] with its diagonal and its first column picked out, the others scaled."""
    return torch.stack([y.diagonal(0, 2, 3), y.select(3, 0)], 1)


PICKED = torch.tensor([2, 0, 2])
aten = torch.ops.aten

# Operators that no layer of the registry uses.
OTHERS = [
    layer("adaptive_pool_3d", lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.AdaptiveAvgPool3d(2)), 2, 1, 4, 4, 4),
    layer("reflect_1d", lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReflectionPad1d(2), nn.Conv1d(3, 2, 2)), 2, 2, 6),
    layer("replicate_1d", lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReplicationPad1d(2), nn.Conv1d(3, 2, 2)), 2, 2, 6),
    layer("replicate_2d", after_conv(lambda y: F.pad(y, (1, 2, 0, 1), mode="replicate")), 2, 2, 5, 5),
    layer("upsample_1d", lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Upsample(scale_factor=2)), 2, 2, 6),
    layer("gather", after_linear(lambda y: y.gather(1, PICKED.expand(len(y), 3))), 5, 4),
    layer("index_select", after_linear(lambda y: y.index_select(1, PICKED)), 5, 4),
    layer("select_scatter", after_linear(select_written), 5, 4),
    layer("diagonal", after_conv(square_channels), 2, 2, 6, 6),
    layer("split_unevenly", after_linear(lambda y: torch.cat([i * part for i, part in enumerate(y.split([1, 2, 3], 1))], 1)), 5, 4),
    layer("squeeze_all", lambda: Apply(nn.Conv2d(2, 3, 5), lambda inner, x: inner(x).squeeze()), 4, 2, 5, 5),
    layer("squeeze_two", lambda: Apply(nn.Conv2d(2, 3, 5), lambda inner, x: inner(x).squeeze((2, 3))), 4, 2, 5, 5),
    layer("windows", after_linear(lambda y: y.unfold(1, 3, 2).flatten(1)), 5, 4),
    layer("windows_of_weight", lambda: Apply(nn.Linear(4, 6), lambda inner, x: x @ inner.weight.unfold(0, 3, 1)[0]), 5, 4),
    layer("detach", after_linear(lambda y: y - 2 * y.detach()), 5, 4),
    layer("in_float64", after_linear(lambda y: aten._to_copy.default(y, dtype=torch.float64)), 5, 4),
    layer("joined_parameters", lambda: Apply(nn.Linear(4, 3), lambda inner, x: x @ torch.cat([inner.weight, 2 * inner.weight]).t()), 5, 4),
    layer("masked_weight", lambda: Apply(nn.Linear(4, 3), lambda inner, x: x @ (inner.weight.tanh() * torch.ones(3, 4).tril()).t()), 5, 4),
    layer("repeated_column", lambda: Apply(nn.Linear(4, 3), lambda inner, x: x[:, :3] * inner.bias[:, None].expand(3, 5).t() + inner.bias[0].expand(5, 3)), 5, 4),
    Case("segmentation", lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 5), lambda y, t: F.cross_entropy(y, t.expand(3, 3, 2).permute(2, 0, 1)), classes=3),
    Case("summed", lambda: nn.Linear(4, 3), (5, 4), lambda y, t: y.square().sum() / t.numel()),
]  # fmt: skip


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_operators_agree_with_reference(case: Case) -> None:
    module, inputs, targets = case.build()
    module.double()
    found = cge(module, inputs, targets, case.loss)
    expected = reference.cge(module, inputs, targets, case.loss)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-5, atol=1e-8)


def test_every_rule_answers_in_some_case(monkeypatch: pytest.MonkeyPatch) -> None:
    answered: set[object] = set()

    def counting(target: object, function: registry.Rule) -> registry.Rule:
        def counted(call: registry.Call) -> registry.Result:
            result = function(call)
            if result is not None:
                answered.add(target)
            return result

        return counted

    monkeypatch.setattr(registry, "_rules", {target: counting(target, f) for target, f in registry._rules.items()})
    for case in [*LAYERS, *NETWORKS, *OTHERS]:
        module, inputs, targets = case.build()
        few = {name: torch.arange(min(2, p.numel())) for name, p in module.named_parameters()}
        cge(module.double(), inputs, targets, case.loss, coordinates=few)
    silent = registry._rules.keys() - answered
    assert not silent, f"no case reaches the rules of {sorted(map(str, silent))}"


SHAPES = [
    # stride, padding, output padding, dilation, groups
    ([1], [0], [0], [1], 1),
    ([2], [1], [1], [1], 2),
    ([2, 1], [1, 0], [0, 0], [1, 2], 2),
    ([3, 2], [2, 1], [2, 1], [1, 1], 1),
    ([1, 2, 1], [0, 1, 0], [0, 1, 0], [2, 1, 1], 2),
]


@pytest.mark.parametrize("stride, padding, output_padding, dilation, groups", SHAPES)
def test_owner_rule_of_transposed_convolutions(
    stride: list[int], padding: list[int], output_padding: list[int], dilation: list[int], groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    space, kernel = [4, 3, 3][: len(stride)], [3, 2, 2][: len(stride)]
    inputs = torch.randn(2, 4, *space, dtype=torch.float64, generator=generator)
    weights = torch.randn(4, 3, *kernel, dtype=torch.float64, generator=generator)
    rest = (None, stride, padding, dilation, True, output_padding, groups)
    output = aten.convolution.default(inputs, weights, *rest)
    change = OneHot(
        torch.arange(0, weights.numel(), 5), torch.linspace(-1, 1, len(range(0, weights.numel(), 5))).double()
    )
    call = registry.Call(aten.convolution.default, (inputs, weights, *rest), {}, (None, change), output, 1)
    found = transposed.weight(call, change)
    assert found.width == 1
    for one, position, step in zip(dense(found, output.shape), change.positions, change.steps, strict=True):
        moved = weights.clone()
        moved.view(-1)[position] += step
        torch.testing.assert_close(one, aten.convolution.default(inputs, moved, *rest) - output)


def block_of(target: object, args: tuple[Any, ...], position: int, change: Change | OneHot, **kwargs: Any) -> Any:
    """What a rule makes of one changed operand, compared with the general path."""
    output = target(*args, **kwargs)
    changes = tuple(change if i == position else None for i in range(len(args)))
    call = registry.Call(target, args, kwargs, changes, output, 2, frozenset({0}))
    found, exact = rule_for(target)(call), general(replace(call, kept={}))
    pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
    outputs = output if isinstance(output, (tuple, list)) else [output]
    for (mine, right), base in zip(pairs, outputs, strict=True):
        if isinstance(mine, (Change, OneHot)):
            torch.testing.assert_close(dense(mine, base.shape), right.delta)
    return found


IMAGES = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
SQUARE = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def block(base: Tensor, dim: int, *start: int, width: int = 1) -> Change:
    shape = [2, *base.shape]
    shape[1 + dim] = width
    return Change(
        0.1 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)), Block(dim, start)
    )


THIN = {
    "group norm, one channel: its group": (aten.native_group_norm.default, (IMAGES, None, None, 2, 4, 9, 2, 1e-5), block(IMAGES, 1, 3, 0), 1, (2, 0), 2),
    "layer norm of one token": (aten.native_layer_norm.default, (TOKENS, [6], None, None, 1e-5), block(TOKENS, 1, 4, 2), 1, (4, 2), 1),
    "softmax along another axis": (aten._softmax.default, (TOKENS, 2, False), block(TOKENS, 1, 4, 2), 1, (4, 2), 1),
    "mean over another axis": (aten.mean.dim, (IMAGES, [2, 3]), block(IMAGES, 1, 3, 0), 1, (3, 0), 1),
    "variance over another axis": (aten.var.correction, (IMAGES, [2, 3]), block(IMAGES, 1, 3, 0), 1, (3, 0), 1),
    "logsumexp over another axis": (aten.logsumexp.default, (IMAGES, [0]), block(IMAGES, 1, 3, 0), 0, (3, 0), 1),
    "rows of a batched product": (aten.bmm.default, (TOKENS, TOKENS.mT), block(TOKENS, 1, 4, 2), 1, (4, 2), 1),
    "examples of a batched product": (aten.bmm.default, (TOKENS, TOKENS.mT), block(TOKENS, 0, 1, 2), 0, (1, 2), 1),
    "one matrix for all": (aten.bmm.default, (TOKENS, SQUARE.expand(3, 6, 6)), block(TOKENS, 1, 4, 2), 1, (4, 2), 1),
    "split axis": (aten.view.default, (TOKENS, [3, 5, 3, 2]), block(TOKENS, 2, 5, 0), 2, (2, 0), 1),
    "selected from another axis": (aten.select.int, (TOKENS, 1, 2), block(TOKENS, 2, 5, 0), 1, (5, 0), 1),
    "slice that holds it": (aten.slice.Tensor, (TOKENS, 2, 3, 6), block(TOKENS, 2, 5, 4), 2, (2, 1), 1),
    "expanded": (aten.expand.default, (SQUARE, [3, 6, 6]), OneHot(torch.tensor([7, 8]), torch.ones(2).double()), 2, (1, 2), 1),
    "prelu": (aten._prelu_kernel.default, (IMAGES, torch.ones(1, 4, 1, 1).double()), block(IMAGES, 1, 3, 0), 1, (3, 0), 1),
    "gelu": (aten.gelu.default, (IMAGES,), block(IMAGES, 1, 3, 0), 1, (3, 0), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", THIN)
def test_blocks_stay_blocks(name: str) -> None:
    target, args, change, dim, start, width = THIN[name]
    found = block_of(target, args, 0, change)
    found = found[0] if isinstance(found, tuple) else found
    assert found.block == Block(dim, start)
    assert found.width == width


def test_pieces_that_do_not_move_are_named() -> None:
    first, second, third = block_of(aten.split.Tensor, (TOKENS, 2, 2), 0, block(TOKENS, 2, 2, 3))
    assert first is None and third is None
    assert second.block == Block(2, (0, 1))


def test_one_element_stays_one_element() -> None:
    change = OneHot(torch.tensor([7, 30]), torch.tensor([0.1, -0.2]).double())
    for target, args in [(aten.tanh.default, (SQUARE,)), (aten.mul.Tensor, (SQUARE, TOKENS[0, 0]))]:
        assert isinstance(block_of(target, args, 0, change), OneHot)


def test_a_second_rule_for_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aten\.relu\.default already has the rule relu"):
        rule(torch.ops.aten.relu.default)(lambda call: None)
