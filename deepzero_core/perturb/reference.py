"""The slow, obviously correct version of the estimators: one full forward pass per query.

Every fast path is tested against this file; a reader who doubts the engine reads this instead.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deepzero_core.perturb.coordinates import count, resolve, scatter
from deepzero_core.perturb.estimate import GradientEstimate, check_arguments, check_queries
from deepzero_core.perturb.objective import (
    Evaluation,
    LossFn,
    RandomState,
    objective,
    preserved_random_state,
    state_of,
)


def cge(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    mu: float = 5e-3,
    coordinates: Mapping[str, Tensor] | None = None,
    difference: str = "forward",
    precision: str = "float32",
) -> GradientEstimate:
    """ĝᵢ = [l(θ + μeᵢ) − l(θ)]/μ, or [l(θ + μeᵢ) − l(θ − μeᵢ)]/2μ. Arguments as in `deepzero_core.cge`."""
    check_arguments(mu, difference, precision)
    chosen = resolve(module, coordinates)
    theta, _ = state_of(module)
    base, loss_at = _losses(module, inputs, targets, loss_fn)
    values = {}
    for name, indices in chosen.items():
        slopes = []
        for index in indices.tolist():
            step = torch.zeros_like(theta[name]).flatten()
            step[index] = mu
            slopes.append(_slope(loss_at, base.loss, {name: step.view_as(theta[name])}, mu, difference))
        values[name] = torch.tensor(slopes, dtype=theta[name].dtype, device=theta[name].device)
    queries = 1 + count(chosen) * (2 if difference == "central" else 1)
    return GradientEstimate(scatter(theta, chosen, values), queries, base.loss.item(), base.outputs, base.buffers)


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
    """ĝ = (1/q) Σₖ [l(θ + μuₖ) − l(θ)]/μ · uₖ with uₖ ~ N(0, I). Arguments as in `deepzero_core.rge`."""
    check_arguments(mu, difference)
    check_queries(queries)
    theta, _ = state_of(module)
    base, loss_at = _losses(module, inputs, targets, loss_fn)
    gradients = {name: torch.zeros_like(value) for name, value in theta.items()}
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for seed in seeds(queries, generator):
        direction = gaussian({name: theta[name] for name in trainable}, seed, generator.device)
        steps = {name: mu * u for name, u in direction.items()}
        slope = _slope(loss_at, base.loss, steps, mu, difference)
        for name, u in direction.items():
            gradients[name] += slope / queries * u
    spent = 1 + queries * (2 if difference == "central" else 1)
    return GradientEstimate(gradients, spent, base.loss.item(), base.outputs, base.buffers)


def seeds(queries: int, generator: torch.Generator) -> list[int]:
    """One seed of 63 bits for each direction, all from one draw of the generator."""
    highest = torch.iinfo(torch.int64).max
    drawn: list[int] = torch.randint(highest, (queries,), generator=generator, device=generator.device).tolist()
    return drawn


def gaussian(parameters: Mapping[str, Tensor], seed: int, device: torch.device) -> dict[str, Tensor]:
    """u ~ N(0, I) by parameter name: a function of the seed, the device it is drawn on and the parameters' shapes.

    Who knows the seed can draw the direction again; where θ lies does not matter.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype, device=device).to(value.device)
        for name, value in parameters.items()
    }


def _losses(
    module: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn
) -> tuple[Evaluation, Callable[[Mapping[str, Tensor], float], float]]:
    """The base evaluation, and l(θ + sign·step) as a function of (step, sign), all under the same random numbers."""
    theta, buffers = state_of(module)
    random_state = RandomState()

    def loss_at(step: Mapping[str, Tensor], sign: float) -> float:
        moved = {name: value + sign * step[name] if name in step else value for name, value in theta.items()}
        with torch.no_grad(), preserved_random_state():
            random_state.restore()
            return objective(module, moved, buffers, inputs, targets, loss_fn).loss.item()

    with torch.no_grad():
        base = objective(module, theta, buffers, inputs, targets, loss_fn)
    return base, loss_at


def _slope(
    loss_at: Callable[[Mapping[str, Tensor], float], float],
    base: Tensor,
    step: Mapping[str, Tensor],
    mu: float,
    difference: str,
) -> float:
    if difference == "central":
        return (loss_at(step, 1.0) - loss_at(step, -1.0)) / (2 * mu)
    return (loss_at(step, 1.0) - base.item()) / mu
