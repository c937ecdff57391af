"""How far a simulation is from its reference. Velocities as images: [..., 2, Y, X], x then y.

MAE       mean |v − r|                 relative    Σ|v − r| / Σ|r|
E(k)      Σ over wave vectors of length k ± ½ of ½|v̂|²; ΣE = ½⟨|v|²⟩, the mean over the domain included as k = 0
"""

import torch
from torch import Tensor


def mean_absolute_error(velocity: Tensor, reference: Tensor) -> Tensor:
    """[...]: over components and place."""
    return (velocity - reference).abs().mean((-3, -2, -1))


def relative_error(velocity: Tensor, reference: Tensor) -> Tensor:
    """[...]: the sum of absolute errors over that of the reference."""
    return (velocity - reference).abs().sum((-3, -2, -1)) / reference.abs().sum((-3, -2, -1))


def energy_spectrum(velocity: Tensor) -> Tensor:
    """E [..., K], k in periods of the longer side, from 0. Exact for periodic fields; others are taken for such."""
    y, x = velocity.shape[-2:]
    longest = max(y, x)
    # Cells are square: waves per longer side are waves per cell times its number of cells.
    waves = torch.fft.fftfreq(y)[:, None].square() + torch.fft.fftfreq(x)[None].square()
    shell = (waves.sqrt() * longest).round().long().flatten().to(velocity.device)
    energy = torch.fft.fft2(velocity).abs().square().sum(-3).flatten(-2) / (2 * (y * x) ** 2)
    spectrum = torch.zeros(*energy.shape[:-1], int(shell.max()) + 1, dtype=energy.dtype, device=energy.device)
    return spectrum.index_add(-1, shell, energy)


def spectrum_error(velocity: Tensor, reference: Tensor) -> Tensor:
    """[...]: the mean over k of |ln E/E_ref|, up to half the smaller number of cells, what both grids resolve."""
    resolved = max(velocity.shape[-2:]) // 2
    found, wanted = (energy_spectrum(value)[..., 1 : resolved + 1] for value in (velocity, reference))
    tiny = torch.finfo(found.dtype).tiny
    return (found.clamp(min=tiny) / wanted.clamp(min=tiny)).log().abs().mean(-1)
