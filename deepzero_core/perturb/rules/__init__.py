"""The rules, one file per layer family; importing this package registers them all."""

from deepzero_core.perturb.rules import (
    activation,
    attention,
    conv,
    elementwise,
    embedding,
    layer_norm,
    linear,
    losses,
    movement,
    norm,
    piecewise,
    pool,
    powers,
    reduction,
    smooth,
    softmax,
    variance,
)
from deepzero_core.perturb.rules.general import general
from deepzero_core.perturb.rules.registry import Call, Result, Rule, find, rule

__all__ = [
    "Call",
    "Result",
    "Rule",
    "activation",
    "attention",
    "conv",
    "elementwise",
    "embedding",
    "find",
    "general",
    "layer_norm",
    "linear",
    "losses",
    "movement",
    "norm",
    "piecewise",
    "pool",
    "powers",
    "reduction",
    "rule",
    "smooth",
    "softmax",
    "variance",
]
