"""The pictures of a defence's report; see `tasks.plots`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from tasks.plots import certified_steps, legend_below, line_style, new_figure
from tasks.records import DefenceResult

DEFENCE_NAMES = {
    "none": "no defence",
    "fo-ds": "FO-DS",
    "zo-ds": "ZO-DS",
    "zo-ae-ds": "ZO-AE-DS",
    "deepzero": "DeepZero",
    "deepzero-split": "DeepZero-split",
}

Grouped = Mapping[str, Sequence[DefenceResult]]
"""By method, the results of all seeds, in the order of the report."""


def accuracy_curves(results: Grouped, path: Path) -> None:
    """Certified accuracy against radius: a line per method, the mean over the seeds, and the range of the seeds."""
    with new_figure(path, (7.6, 4.8)) as figure:
        axes = figure.subplots()
        end = 0.1
        for index, (method, several) in enumerate(results.items()):
            steps = [certified_steps(result.certified.table) for result in several]
            listed = [radius for result in several for radius in result.certified.accuracy_at]
            end = max(end, *listed, *(1.05 * float(radii[-1]) for radii, _ in steps))
            grid = np.unique(np.concatenate([*(radii for radii, _ in steps), np.asarray(listed)]))
            shares = np.stack([_at(radii, share, grid) for radii, share in steps])
            style = line_style(index)
            name = DEFENCE_NAMES[method]
            axes.step([*grid, end], [*shares.mean(0), 0.0], where="pre", label=name, **style)
            if len(several) > 1:
                axes.fill_between(
                    grid, shares.min(0), shares.max(0), step="pre", alpha=0.13, color=style["color"], linewidth=0
                )
        axes.set(xlim=(0, end), ylim=(0, 1.0), title="Certified accuracy", ylabel="share of the examples")
        axes.set_xlabel("radius (ℓ₂, images in [0, 1])")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        legend_below(figure, axes, columns=3)


def _at(radii: NDArray[np.float64], shares: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The step function "share with a certified radius of at least r" on a grid."""
    where = np.searchsorted(radii, grid, side="left")
    return np.append(shares, 0.0)[where]


@dataclass(frozen=True)
class Row:
    """Images of a grid, float [N, C, H, W] in [0, 1], what they are, and what the classifier takes each for."""

    name: str
    images: Tensor
    answers: Sequence[str]
    right: Sequence[bool]


def grid(rows: Sequence[Row], path: Path) -> None:
    """Images below one another: as they are, with noise, and what each method makes of them."""
    count = len(rows[0].images)
    with new_figure(path, (1.0 * count + 1.6, 1.22 * len(rows) + 0.3)) as figure:
        places = figure.subplots(len(rows), count, squeeze=False)
        for row, axes_of_row in zip(rows, places, strict=True):
            for image, answer, right, axes in zip(row.images, row.answers, row.right, axes_of_row, strict=True):
                shown = image.clamp(0, 1).permute(1, 2, 0).numpy()
                gray = shown.shape[2] == 1
                axes.imshow(shown[..., 0] if gray else shown[..., :3], cmap="gray" if gray else None, vmin=0, vmax=1)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(False)
                axes.set_xlabel(answer, fontsize=8, color="#00724f" if right else "#b3261e", labelpad=2)
            label = axes_of_row[0].set_ylabel(row.name, rotation=0, ha="right", va="center", fontsize=9)
            label.set_multialignment("right")


def noisy_images(images: Tensor, sigma: float) -> Tensor:
    """The same noise for every report."""
    return images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
