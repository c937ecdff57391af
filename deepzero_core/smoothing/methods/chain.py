"""The chain rule up to the boundary of the black box: whatever is known at the boundary goes back into the network.

z = network(x + δ), [B, …], is the network's output and the black box's input: images, or numbers of a latent. Given a
gradient a_i of each example's loss at z_i, the gradient of the mean loss is ∇_θ (1/B) Σ_i a_iᵀ z_i(θ).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deepzero_core.estimators import first_order
from deepzero_core.perturb.estimate import GradientEstimate


@dataclass(frozen=True)
class AtBoundary:
    """What is known at the boundary. losses: [B]; logits: [B, K]; gradient: [B, …], of each example's loss at z."""

    losses: Tensor
    logits: Tensor
    gradient: Tensor


def chain_rule(
    network: nn.Module, inputs: Tensor, boundary: Callable[[Tensor], AtBoundary], *, queries: int
) -> GradientEstimate:
    """∇_θ (1/B) Σ aᵢᵀ zᵢ(θ), by one forward and one backward pass of the network; the network is only read.

    boundary: called once with z, detached. The outputs of the estimate are the classifier's logits.
    """
    found: list[AtBoundary] = []

    def linear(z: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            found.append(boundary(z.detach()))
        return (found[0].gradient.to(z) * z).flatten(1).sum(1)

    estimate = first_order(network, inputs, inputs, linear)
    (known,) = found
    return replace(estimate, queries=queries, loss=known.losses.mean().item(), outputs=known.logits)
