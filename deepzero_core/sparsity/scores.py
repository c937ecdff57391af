"""Scores of weights: higher = keep, for every criterion.

All functions return dict[parameter name, Tensor of the parameter's shape], with one entry per maskable parameter
(`maskable_parameters`). Inputs [B, …], targets with a leading batch axis; loss_fn(outputs, targets) is a mean over
the batch or returns one loss per example, [B]. The module runs in the mode it is in. Its parameters and buffers,
BatchNorm's running statistics included, and the global random state are the same before and after.

GraSP (Wang, Zhang and Grosse 2020). With g = ∇l(θ) and H = ∇²l(θ), taken over all trainable parameters, removing
weight i (the step −θ_i e_i) changes the gradient flow ‖g‖² to first order by 2·S_i, S = −θ ⊙ Hg. GraSP removes the
highest S first, so the score returned here is −S = θ ⊙ Hg.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepzero_core.errors import RequestError
from deepzero_core.estimators import rge
from deepzero_core.perturb.objective import LossFn, objective, preserved_random_state, state_of

_MASKABLE = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def maskable_parameters(module: nn.Module) -> list[str]:
    """Names of the trainable weights of convolutions, transposed convolutions and linear layers.

    Biases and the parameters of normalisation layers are few and never masked. Names and order are those of
    `module.named_parameters()`, so a shared weight is there once.
    """
    weights = {id(layer._parameters.get("weight")) for layer in module.modules() if isinstance(layer, _MASKABLE)}
    return [name for name, value in module.named_parameters() if id(value) in weights and value.requires_grad]


def grasp_scores(module: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> dict[str, Tensor]:
    """GraSP's θ ⊙ Hg, exact up to rounding; Hg = ∇(gᵀ stop(g)) by two backward passes.

    RequestError: the module has no maskable parameter.
    """
    names = _maskable_or_raise(module)
    parameters, buffers = state_of(module)
    trainable = [name for name, value in module.named_parameters() if value.requires_grad]
    values = [parameters[name].requires_grad_() for name in trainable]  # detached: the module's own stay as they are
    # The fused attention kernels have no second derivative; the mathematical one has.
    with preserved_random_state(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = objective(module, parameters, buffers, inputs, targets, loss_fn).loss
        gradient = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
        flow = torch.stack([(g * g.detach()).sum() for g in gradient]).sum()
        if flow.requires_grad:
            products = torch.autograd.grad(flow, values, materialize_grads=True)
        else:  # a loss linear in every parameter: H = 0
            products = tuple(torch.zeros_like(value) for value in values)
    by_name = dict(zip(trainable, products, strict=True))
    return {name: parameters[name].detach() * by_name[name].detach() for name in names}


def zo_grasp_scores(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    queries: int = 192,
    mu: float = 5e-3,
    generator: torch.Generator,
    common_directions: bool = True,
) -> dict[str, Tensor]:
    """GraSP's score from function values alone: θ ⊙ [ĝ(θ + μĝ(θ)) − ĝ(θ)]/μ, every ĝ an RGE (Chen et al. 2024).

    queries: random directions of each of the two RGEs, q.
    common_directions: both RGEs use the same q directions. With P = (1/q) Σ u uᵀ the difference is then close to
    P·H·P·g, and tends to Hg as q grows. With independent ones, P and Q, it holds (Q − P)·g/μ as well: sampling noise,
    1/μ times as large, in which nothing of H is left. `False` is for showing this.
    The generator is left where one RGE (common directions) or both of them (independent) leave it.

    RequestError: no maskable parameter, mu not positive, queries below 1.
    """
    names = _maskable_or_raise(module)
    if not mu > 0:
        raise RequestError(f"mu, the finite-difference step, must be positive, but is {mu}")
    if queries < 1:
        raise RequestError(f"queries must be at least 1, but is {queries}")

    def estimate(at: nn.Module) -> dict[str, Tensor]:
        # Each starts from the caller's random state: dropout, too, is common to both.
        with preserved_random_state():
            return rge(at, inputs, targets, loss_fn, queries=queries, mu=mu, generator=generator).gradients

    directions = generator.get_state()
    here = estimate(module)
    shifted = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in shifted.named_parameters():
            if value.requires_grad:
                value.add_(here[name], alpha=mu)
    if common_directions:
        generator.set_state(directions)
    there = estimate(shifted)
    values = dict(module.named_parameters())
    return {name: values[name].detach() * (there[name] - here[name]) / mu for name in names}


def magnitude_scores(module: nn.Module) -> dict[str, Tensor]:
    """|θ|. RequestError: the module has no maskable parameter."""
    names = _maskable_or_raise(module)
    values = dict(module.named_parameters())
    return {name: values[name].detach().abs() for name in names}


def random_scores(module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform on [0, 1), a function of the generator. RequestError: the module has no maskable parameter."""
    names = _maskable_or_raise(module)
    values = dict(module.named_parameters())
    return {
        name: torch.rand(values[name].shape, generator=generator, device=generator.device).to(values[name].device)
        for name in names
    }


def _maskable_or_raise(module: nn.Module) -> list[str]:
    names = maskable_parameters(module)
    if not names:
        raise RequestError(
            f"{type(module).__name__} has no trainable weight of a convolution or linear layer: "
            "there is nothing to prune"
        )
    return names
