"""Randomised gradient estimation (RGE).

    ĝ = (1/q) Σₖ [l(θ + μuₖ) − l(θ)]/μ · uₖ,   uₖ ~ N(0, I)

or with [l(θ + μuₖ) − l(θ − μuₖ)]/2μ. Unbiased for the gradient of the smoothed loss; variance O(d/q).
Source: Nesterov and Spokoiny 2017; as used in DeepZero (Chen et al., ICLR 2024).
"""

import torch
from torch import Tensor, nn

from deepzero_core.perturb import reference
from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.perturb.objective import LossFn


def rge(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    queries: int,
    mu: float = 5e-3,
    generator: torch.Generator,
    difference: str = "forward",
) -> GradientEstimate:
    """Estimate the gradient from `queries` random directions over all trainable parameters.

    A direction moves every parameter, so that no feature can be reused: one forward pass per query is the whole method,
    and the reference is its implementation. The directions are the generator's alone. Arguments and guarantees
    otherwise as in `cge`.

    Raises:
        RequestError: queries < 1, mu ≤ 0, unknown difference.
    """
    return reference.rge(
        module, inputs, targets, loss_fn, queries=queries, mu=mu, generator=generator, difference=difference
    )
