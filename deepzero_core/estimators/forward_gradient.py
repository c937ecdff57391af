"""Forward gradient: exact directional derivatives by forward-mode differentiation, no difference taken.

    ĝ = (1/q) Σₖ (∇l(θ)ᵀuₖ)·uₖ,   uₖ ~ N(0, I)

The baseline for what RGE could reach with μ → 0; it needs a differentiable module. A Jacobian-vector product counts as
one query. Source: Baydin et al. 2022, "Gradients without backpropagation".
"""

import warnings

import torch
from torch import Tensor, nn

from deepzero_core.perturb.estimate import GradientEstimate, check_queries
from deepzero_core.perturb.objective import LossFn, RandomState, objective, preserved_random_state, state_of
from deepzero_core.perturb.reference import gaussian, seeds


def forward_gradient(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    queries: int,
    generator: torch.Generator,
) -> GradientEstimate:
    """Estimate the gradient from `queries` Jacobian-vector products along random directions. See `rge`.

    Raises:
        RequestError: queries < 1.
    """
    check_queries(queries)
    parameters, buffers = state_of(module)
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    random_state = RandomState()
    with torch.no_grad():
        base = objective(module, parameters, buffers, inputs, targets, loss_fn)

    def loss_of(moving: dict[str, Tensor]) -> Tensor:
        return objective(module, {**parameters, **moving}, buffers, inputs, targets, loss_fn).loss

    gradients = {name: torch.zeros_like(value) for name, value in parameters.items()}
    primal = {name: parameters[name] for name in trainable}
    for seed in seeds(queries if trainable else 0, generator):
        direction = gaussian(primal, seed, generator.device)
        with preserved_random_state(), warnings.catch_warnings():
            # torch scripts decompositions of its own at the first use of forward mode and warns of that.
            warnings.filterwarnings(
                "ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning
            )
            random_state.restore()
            slope: Tensor = torch.func.jvp(loss_of, (primal,), (direction,))[1]
        for name, u in direction.items():
            gradients[name] += slope.detach() / queries * u
    return GradientEstimate(gradients, 1 + queries, base.loss.item(), base.outputs, base.buffers)
