"""The noise of denoised smoothing, as a function of (seed, step)."""

import torch
from torch import Tensor

from deepzero_core.training.sources import step_generator

_NOISE = 2  # 0 and 1 are the trainer's own streams of a seed
_DIRECTIONS = 3


def noisy(images: Tensor, sigma: float, seed: int, step: int) -> Tensor:
    """x + δ, δ ~ N(0, σ²I): images [B, C, H, W] in [0, 1], σ in the same units, δ drawn from (seed, step) alone.

    Nothing is clipped: certification adds the same noise and clips nothing either.
    """
    noise = torch.randn(images.shape, generator=step_generator(seed, _NOISE, step), dtype=torch.float32)
    return images + sigma * noise.to(images)


def direction_generator(seed: int, step: int) -> torch.Generator:
    """The generator of a step's random directions: a function of (seed, step), and not the noise's."""
    return step_generator(seed, _DIRECTIONS, step)
