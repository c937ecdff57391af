"""The pictures of a solver in the loop's report; see `tasks.plots`."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from tasks.plots import legend_below, line_style, new_figure
from tasks.records import PRETRAINED, LoopResult
from tasks.roll_out import read_images

LOOP_NAMES = {
    "src": "SRC",
    PRETRAINED: "pre-trained",
    "non": "NON",
    "sol-zo": "SOL-ZO",
    "sol-zo-split": "SOL-ZO-split",
    "sol-fo": "SOL-FO",
}
"""From the largest to the smallest error, as the paper found them."""

Grouped = Mapping[str, Sequence[LoopResult]]
"""By method, the results of all seeds, the experiment's own method first."""

_COLOURS = "viridis"
_TIMES = 4
_PANEL = 160
"""Pixels of an animation's panel, at least, along its longer side."""


def in_rows(results: Grouped) -> Grouped:
    """The same in the order of tables and pictures, that of `LOOP_NAMES`."""
    return {method: results[method] for method in LOOP_NAMES if method in results}


def fields(results: Grouped, reference: Tensor, path: Path) -> None:
    """Solver, corrections and reference side by side at several times; of a field on a line, over all times."""
    panels = {**{name: _shown(images) for name, images in _of_first_case(results)}, "reference": _shown(reference)}
    low, high = _range(panels["reference"])
    on_a_line = panels["reference"].ndim == 2
    times = [0] if on_a_line else _times(len(reference))
    _, height, width = (1, 2, 3) if on_a_line else panels["reference"].shape
    tall = min(2.2, max(0.6, height / width))
    with new_figure(path, (1.35 * len(panels) + 0.9, 1.35 * tall * len(times) + 0.5)) as figure:
        places = figure.subplots(len(times), len(panels), squeeze=False)
        for row, time in zip(places, times, strict=True):
            for axes, (name, values) in zip(row, panels.items(), strict=True):
                picture = values if on_a_line else values[time]
                axes.imshow(
                    picture, cmap=_COLOURS, vmin=low, vmax=high, origin="lower", aspect="auto" if on_a_line else "equal"
                )
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(False)
                if time == times[0]:
                    axes.set_title(name, fontsize=9)
            row[0].set_ylabel("time →" if on_a_line else f"frame {time + 1}", fontsize=9)


def error_curves(results: Grouped, path: Path) -> None:
    """Mean absolute error against time, with the spread of the test cases."""
    with new_figure(path, (7.6, 4.4)) as figure:
        axes = figure.subplots()
        for index, (method, several) in enumerate(results.items()):
            curves = np.stack([_curves(result) for result in several])
            frames = np.arange(1, curves.shape[2] + 1)
            style = line_style(index)
            with np.errstate(all="ignore"):
                by_case = _nanmean(curves, 0)
                mean, deviation = _nanmean(by_case, 0), _nanstd(by_case, 0)
            axes.plot(frames, mean, label=LOOP_NAMES[method], **style)
            axes.fill_between(frames, mean - deviation, mean + deviation, alpha=0.1, color=style["color"], linewidth=0)
        axes.set(title="Error over time", xlabel="frame", ylabel="mean absolute error")
        axes.set_ylim(bottom=0)
        # Six in two equal lines, fewer in one.
        legend_below(figure, axes, columns=3 if len(results) > 5 else 5)


def bars(results: Grouped, published: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Error over that of the solver alone: ours beside the paper's."""
    methods = list(in_rows(results))
    ours = {m: [error for result in results[m] for error in result.rolled.mae] for m in methods}
    unit = statistics.mean(ours["src"]) if "src" in ours else 1.0
    paper_unit = published["src"][0] if "src" in ours else 1.0
    with new_figure(path, (7.6, 4.0)) as figure:
        axes = figure.subplots()
        places = np.arange(len(methods))
        means = [statistics.mean(ours[m]) / unit for m in methods]
        spreads = [statistics.stdev(ours[m]) / unit if len(ours[m]) > 1 else 0.0 for m in methods]
        style = {"capsize": 3, "error_kw": {"linewidth": 1}}
        beside = np.array([0.2 if m in published else 0.0 for m in methods])
        axes.bar(places - beside, means, 0.38, yerr=spreads, label="here", color="#0072B2", **style)
        known = [(place, published[m]) for place, m in zip(places, methods, strict=True) if m in published]
        axes.bar(
            [place + 0.2 for place, _ in known],
            [mean / paper_unit for _, (mean, _) in known],
            0.38,
            yerr=[deviation / paper_unit for _, (_, deviation) in known],
            label="paper, wake flow",
            color="#E69F00",
            **style,
        )
        axes.set_xticks(places, [LOOP_NAMES[m] for m in methods])
        axes.set(title="Error over that of the solver alone" if "src" in ours else "Error", ylabel="MAE / MAE of SRC")
        axes.grid(False, axis="x")
        legend_below(figure, axes, columns=2)


def animation(results: Grouped, reference: Tensor, path: Path) -> None:
    """A GIF of solver, main correction and reference, a picture per frame."""
    found = dict(_of_first_case(results))
    chosen = [name for name in (LOOP_NAMES["src"], LOOP_NAMES[next(iter(results))]) if name in found]
    panels = {name: _shown(found[name]) for name in dict.fromkeys(chosen)} | {"reference": _shown(reference)}
    low, high = _range(panels["reference"])
    colours = matplotlib.colormaps[_COLOURS]
    height, width = panels["reference"].shape[1:]
    scale = max(1, _PANEL // max(height, width))
    size, head, gap = (width * scale, height * scale), 16, 6
    frames = []
    for number in range(len(reference)):
        canvas = Image.new("RGB", (len(panels) * (size[0] + gap) - gap, size[1] + head), "white")
        pen = ImageDraw.Draw(canvas)
        for place, (name, values) in enumerate(panels.items()):
            level = np.clip((np.nan_to_num(values[number], nan=low) - low) / (high - low), 0, 1)
            picture = Image.fromarray((colours(level[::-1])[..., :3] * 255).astype(np.uint8))
            left = place * (size[0] + gap)
            canvas.paste(picture.resize(size, Image.Resampling.NEAREST), (left, head))
            pen.text((left + 2, 2), f"{name}  {number + 1}" if place == 0 else name, fill="black")
        frames.append(canvas.quantize(128, dither=Image.Dither.NONE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=80, loop=0, optimize=False)


def _of_first_case(results: Grouped) -> list[tuple[str, Tensor]]:
    """Images of the first seed."""
    return [(LOOP_NAMES[method], read_images(several[0].rolled.images)) for method, several in in_rows(results).items()]


def _shown(images: Tensor) -> NDArray[np.float64]:
    """[T, Y, X] or [T, X] of images [T, C, …]: the speed of a velocity in the plane, else the first channel."""
    if images.ndim == 4 and images.shape[1] == 2:
        return np.asarray(images.double().square().sum(1).sqrt().numpy())
    return np.asarray(images[:, 0].double().numpy())


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low, low + 1.0)


def _times(frames: int) -> list[int]:
    count = min(_TIMES, frames)
    return sorted({(number + 1) * frames // count - 1 for number in range(count)})


def _curves(result: LoopResult) -> NDArray[np.float64]:
    """Errors [case, frame], NaN from a divergence on."""
    column = pq.read_table(result.rolled.table, columns=["mae"]).column("mae").to_numpy()
    return np.asarray(column, dtype=np.float64).reshape(len(result.rolled.cases), -1)


def _nanmean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """NaN where all are, without numpy's warning."""
    known = np.isfinite(values)
    count = known.sum(axis)
    return np.where(count > 0, np.where(known, values, 0).sum(axis) / np.maximum(count, 1), np.nan)


def _nanstd(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.sqrt(_nanmean((values - _nanmean(values, axis)) ** 2, axis))
