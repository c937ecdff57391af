"""A network together with the normalisation of its inputs, so that noise and radii are in units of the image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepzero_core.errors import RequestError


class Normalised(nn.Module):
    """net((x − mean) / std) for images x [B, C, H, W] in [0, 1]; mean and std per channel, [C].

    mean and std are buffers: they follow the network to its device and into its state_dict.
    RequestError where they differ in length or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean):
            raise RequestError(
                f"mean and std need one number per channel each, but have {len(mean)} and {len(std)} numbers"
            )
        if not all(value > 0 for value in std):
            raise RequestError(f"every std must be positive, but std is {tuple(std)}")
        self.net = net
        self.register_buffer("mean", torch.tensor(tuple(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(tuple(std), dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net((x - self.mean) / self.std)
        return scores
