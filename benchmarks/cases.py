"""The cases: which problem, and which of its coordinates.

| case | network | coordinates |
|---|---|---|
| `cnn5` | the paper's CNN of five blocks, batch 128 | all 12,610 |
| `resnet20-S-bB` | ResNet-20, batch B | those of a mask at ZO-GraSP's ratios for a sparsity of S % |
| `dncnn17` | denoiser, mean squared error, batch 64 | 1,152: as many of every convolution |
| `vit` | vision transformer of four encoders, batch 64 | 1,000: as many of every parameter |

Random images of 32×32 pixels, three channels, ten classes; modules in training mode, as built.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import models, ratios
from benchmarks.problem import Block, Problem, evenly
from deepzero_core.models import build_model
from deepzero_core.sparsity import maskable_parameters

SIZE, CLASSES = 32, 10
NOISE = 0.25
"""Standard deviation of what the denoiser removes, in units of the images' [0, 1]."""


@dataclass(frozen=True)
class Case:
    """A problem and its coordinates; `sample` of each parameter are timed where a baseline would take long."""

    name: str
    about: str
    build: Callable[[], Problem]
    coordinates: Callable[[nn.Module], dict[str, Tensor]]
    sample: int = 2


def dense(module: nn.Module) -> dict[str, Tensor]:
    """Every coordinate."""
    return {name: torch.arange(parameter.numel()) for name, parameter in module.named_parameters()}


def spread(module: nn.Module, names: list[str], total: int) -> dict[str, Tensor]:
    """`total` coordinates, the same number of each parameter as far as it has them, evenly spaced in it."""
    sizes = {name: module.get_parameter(name).numel() for name in names}
    shares, left = {}, total
    for done, name in enumerate(sorted(names, key=sizes.__getitem__)):
        shares[name] = min(sizes[name], left // (len(names) - done))
        left -= shares[name]
    return {name: evenly(torch.arange(sizes[name]), shares[name]) for name in names if shares[name]}


def classification(
    build: Callable[[], nn.Module], cut: Callable[[nn.Module, Tensor], list[Block]], batch: int, size: int = SIZE
) -> Problem:
    """Random images and labels, cross-entropy."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    return Problem(build(), inputs, targets, F.cross_entropy, cut)


def denoising(build: Callable[[], nn.Module], batch: int, size: int = SIZE) -> Problem:
    """Random images with noise, mean squared error."""
    torch.manual_seed(0)
    images = torch.rand(batch, 3, size, size)
    return Problem(build(), images + NOISE * torch.randn_like(images), images, F.mse_loss, models.cut_dncnn)


def cnn(depth: int) -> nn.Module:
    return build_model("cnn", in_channels=3, num_classes=CLASSES, image_size=SIZE, depth=depth, seed=0)


def _resnet20(sparsity: int, batch: int) -> Case:
    return Case(
        f"resnet20-{sparsity}-b{batch}",
        f"ResNet-20, {sparsity} % ratios, batch {batch}",
        lambda: classification(ratios.resnet20, models.cut_resnet, batch),
        lambda module: ratios.coordinates(module, sparsity / 100),
        sample=2 if batch <= 64 else 1,
    )


CASES = {
    case.name: case
    for case in (
        Case(
            "cnn5",
            "CNN depth 5, dense, batch 128",
            lambda: classification(lambda: cnn(5), models.cut_sequential, 128),
            dense,
            sample=8,
        ),
        *(_resnet20(sparsity, batch) for batch in (64, 256) for sparsity in (80, 90, 95, 99)),
        Case(
            "dncnn17",
            "DnCNN-17, 1,152 coordinates, batch 64",
            lambda: denoising(models.dncnn, 64),
            lambda module: spread(module, maskable_parameters(module), 1152),
        ),
        Case(
            "vit",
            "ViT, 1,000 coordinates, batch 64",
            lambda: classification(models.ViT, models.cut_vit, 64),
            lambda module: spread(module, [name for name, _ in module.named_parameters()], 1000),
        ),
    )
}
