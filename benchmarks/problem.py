"""What is differentiated: a module on one batch, its loss, and the blocks that it is cut into.

    outputs = block_n(… block_1(inputs))        every parameter is held by one block

The paper's scheme starts a query at the block that holds the perturbed parameter, so that a block is a convolution with
its normalisation, activation and pooling, a residual block, or an encoder block.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Coordinates = Mapping[str, Tensor]
"""Flat indices by parameter name, [P] each."""


def evenly(indices: Tensor, count: int) -> Tensor:
    """`count` of the indices, or all where there are fewer, evenly spaced."""
    total = len(indices)
    kept = min(count, total)
    return indices[torch.arange(kept) * total // max(kept, 1)]


@dataclass(frozen=True)
class Block:
    """A part of the network as a function of the features before it, and the prefixes of the parameters it holds."""

    run: Callable[[Tensor], Tensor]
    prefixes: tuple[str, ...]

    def holds(self, parameter: str) -> bool:
        return any(parameter == prefix or parameter.startswith(f"{prefix}.") for prefix in self.prefixes)


@dataclass(frozen=True)
class Problem:
    """inputs [B, …], targets [B, …]; loss_fn(outputs, targets) → mean loss; cut(module, inputs) → blocks."""

    module: nn.Module
    inputs: Tensor
    targets: Tensor
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    cut: Callable[[nn.Module, Tensor], list[Block]]

    @property
    def blocks(self) -> list[Block]:
        return self.cut(self.module, self.inputs)

    def to(self, target: torch.dtype | torch.device) -> "Problem":
        """A copy in another type or on another device; class labels keep their type."""
        labels = isinstance(target, torch.dtype) and not self.targets.is_floating_point()
        return replace(
            self,
            module=copy.deepcopy(self.module).to(target),
            inputs=self.inputs.to(target),
            targets=self.targets if labels else self.targets.to(target),
        )

    def block_of(self, parameter: str) -> int:
        """The position of the block that holds a parameter."""
        return next(position for position, block in enumerate(self.blocks) if block.holds(parameter))


@torch.no_grad()
def reuse_flops(problem: Problem, coordinates: Coordinates) -> int:
    """Floating-point operations of products and convolutions that the paper's scheme spends on these coordinates."""
    features, spent = problem.inputs, []
    for block in problem.blocks:
        # The fused attention kernel of the CPU is not counted; the products it consists of are.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            features = block.run(features)
        spent.append(counter.get_total_flops())
    return sum(sum(spent[problem.block_of(name) :]) * indices.numel() for name, indices in coordinates.items())
