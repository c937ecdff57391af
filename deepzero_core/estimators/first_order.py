"""The exact gradient by backpropagation: the baseline that zeroth-order estimators are measured against."""

import torch
from torch import Tensor, nn

from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.perturb.objective import LossFn, objective, state_of


def first_order(module: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: LossFn) -> GradientEstimate:
    """∇l(θ) for all trainable parameters, on the same interface and with the same guarantees as `cge`. One query."""
    parameters, buffers = state_of(module)
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    leaves = {name: value.clone().requires_grad_(name in trainable) for name, value in parameters.items()}
    with torch.enable_grad():
        result = objective(module, leaves, buffers, inputs, targets, loss_fn)
        wanted = trainable if result.loss.requires_grad else []
        found = torch.autograd.grad(result.loss, [leaves[name] for name in wanted], allow_unused=True) if wanted else ()
    gradients = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for name, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            gradients[name] = gradient
    outputs = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, result.outputs)
    return GradientEstimate(gradients, 1, result.loss.item(), outputs, result.buffers)
