"""Every registered rule is exercised by the registry of cases, and none is registered twice."""

# ruff: noqa: E501  (a registry: one case, one line)

import pytest
import torch
from cases import LAYERS, NETWORKS, Apply, Case, after_conv, after_linear, layer
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb.rules import registry, rule


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


def test_a_second_rule_for_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aten\.relu\.default already has the rule relu"):
        rule(torch.ops.aten.relu.default)(lambda call: None)
