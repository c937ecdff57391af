"""Orthonormal cosines over an image, from the lowest frequency to the highest.

    c_k(i) = √(2/n)·cos(π(2i + 1)k/2n),  √(1/n) for k = 0      the cosine transform, DCT-II
    an image's direction is one channel's c_k ⊗ c_l; its frequency (k/H)² + (l/W)²

Source: Ahmed, Natarajan and Rao 1974.
"""

import math

import torch
from torch import Tensor


class Cosines:
    """The C·H·W cosines of images of `shape` (C, H, W), in the type and on the device of `like`.

    Of equal frequency, the first channel comes first.
    """

    def __init__(self, shape: tuple[int, int, int], like: Tensor) -> None:
        channels, height, width = shape
        self._shape = shape
        rows, columns = torch.arange(height) / height, torch.arange(width) / width
        frequency = (rows[:, None].square() + columns.square()).expand(channels, -1, -1)
        # By frequency first and then by channel: a stable sort of the channels last.
        order = frequency.permute(1, 2, 0).flatten().argsort(stable=True)
        self._place = order.to(like.device)  # in [H, W, C]
        self._down, self._across = (_transform(extent).to(like) for extent in (height, width))

    def images(self, ranks: Tensor) -> Tensor:
        """The cosines of these ranks: [P] → [P, C, H, W], of length 1 each."""
        channels, _, width = self._shape
        place = self._place[ranks]
        channel, across, down = place % channels, place // channels % width, place // channels // width
        waves = self._down[down][:, :, None] * self._across[across][:, None, :]
        images = waves.new_zeros(len(ranks), *self._shape)
        images[torch.arange(len(ranks), device=place.device), channel] = waves
        return images

    def sum(self, coefficients: Tensor) -> Tensor:
        """Σₖ coefficientₖ·cosineₖ: [B, C·H·W] by rank → [B, C, H, W]."""
        channels, height, width = self._shape
        placed = torch.zeros_like(coefficients)
        placed[:, self._place] = coefficients
        grid = placed.view(-1, height, width, channels)
        return torch.einsum("bklc,ki,lj->bcij", grid, self._down, self._across)


def _transform(extent: int) -> Tensor:
    """Row k is c_k: [n, n] in float64."""
    index = torch.arange(extent, dtype=torch.float64)
    rows = torch.cos(math.pi / (2 * extent) * index[:, None] * (2 * index + 1)) * math.sqrt(2 / extent)
    rows[0] /= math.sqrt(2)
    return rows
