"""What every gradient estimator returns."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deepzero_core.errors import RequestError, suggest
from deepzero_core.perturb.cost import Cost

DIFFERENCES = ("forward", "central")
PRECISIONS = ("float32", "bfloat16", "value")
"""What differences are computed in.

float32:   changes in the module's own type, beside the cached values: rounding is relative to the change
bfloat16:  the same, and operators linear in a change may round it to bfloat16 where the machine is faster at that
value:     perturbed values in the module's own type, as separate forward passes have them: the paper's arithmetic
"""


@dataclass(frozen=True)
class GradientEstimate:
    """An estimated gradient and what it cost.

    gradients: by parameter name, in the parameter's shape; zero where not estimated.
    queries:   loss evaluations spent, the base one included.
    loss:      l(θ), the base evaluation.
    outputs:   the module's outputs at θ, [B, …].
    buffers:   the module's buffers as the base evaluation leaves them (BatchNorm's running statistics).
    work:      the operations and bytes that the perturbations took, by the cost model; nothing where it has no say.
    """

    gradients: dict[str, Tensor]
    queries: int
    loss: float
    outputs: Any = field(repr=False)
    buffers: dict[str, Tensor] = field(repr=False)
    work: Cost = field(default_factory=Cost, repr=False)


def check_arguments(mu: float, difference: str, precision: str = "float32") -> None:
    """Refuse a smoothing parameter, difference or precision that does not exist.

    Raises:
        RequestError: says which and what would be right.
    """
    if not 0 < mu < math.inf:
        raise RequestError(f"the smoothing parameter mu must be positive and finite, not {mu}")
    if difference not in DIFFERENCES:
        raise RequestError(f"unknown difference {difference!r}: {suggest(difference, DIFFERENCES)}")
    if precision not in PRECISIONS:
        raise RequestError(f"unknown precision {precision!r}: {suggest(precision, PRECISIONS)}")


def check_queries(queries: int) -> None:
    """
    Raises:
        RequestError: fewer than one direction asked for.
    """
    if queries < 1:
        raise RequestError(f"queries, the number of random directions, must be at least 1, not {queries}")
