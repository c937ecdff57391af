"""Every registered rule is exercised by the registry of cases, and none is registered twice."""

import pytest
import torch
from cases import LAYERS, NETWORKS

from deepzero_core import cge
from deepzero_core.perturb.rules import registry, rule

# Registered overloads that no case can reach, with the reason; everything else must answer at least once.
UNREACHED: dict[object, str] = {}


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
    for case in [*LAYERS, *NETWORKS]:
        for training in (True, False):
            module, inputs, targets = case.build()
            module.double().train(training)
            few = {name: torch.arange(min(2, p.numel())) for name, p in module.named_parameters()}
            cge(module, inputs, targets, case.loss, coordinates=few)
    silent = registry._rules.keys() - answered - UNREACHED.keys()
    assert not silent, f"no case reaches the rules of {sorted(map(str, silent))}"


def test_a_second_rule_for_an_operator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aten\.relu\.default already has the rule relu"):
        rule(torch.ops.aten.relu.default)(lambda call: None)
