"""The pictures of a report. Every function draws one PNG from records and the files that they name.

Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart; lines differ in dashes as
well. Figures are made without pyplot: no global state, no display, any thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from deepzero_core.errors import WorkError
from tasks.history import read
from tasks.records import Certified, Evaluated, MethodResult, Pruned

DPI = 150
_DECADE = 10.0

_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PURPLE, _SKY, _BLACK, _GREY = "#CC79A7", "#56B4E9", "#000000", "#8A8F98"
# Black third: the baseline of exact sparse gradients lies on the blue line, and has to be seen there.
_COLOURS = (_BLUE, _ORANGE, _BLACK, _RED, _GREEN, _PURPLE, _SKY)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1)), "-", (0, (5, 1.5)))
_MARKERS = "osD^vPX"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#9AA0A6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E6EA",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}

METHOD_NAMES = {
    "cge": "CGE",
    "rge": "RGE",
    "forward-gradient": "Forward gradient",
    "first-order": "First order",
    "first-order-sparse-weights": "First order, sparse weights",
    "first-order-sparse-gradients": "First order, sparse gradients",
}


def method_name(result: MethodResult) -> str:
    """The method as a person would write it, with its sparsity."""
    name = METHOD_NAMES.get(result.method, result.method)
    return f"{name} ({percent(result.sparsity)} sparse)" if result.sparsity else name


def percent(share: float) -> str:
    """0.9 → 90%, 0.995 → 99.5%."""
    return f"{100 * share:.4g}%"


@dataclass(frozen=True)
class Curves:
    """What a training run recorded; one entry per step, or per evaluation on the test split."""

    steps: NDArray[np.int64]
    loss: NDArray[np.float64]
    test_steps: NDArray[np.int64]
    test_queries: NDArray[np.int64]
    test_accuracy: NDArray[np.float64]


def read_history(path: Path) -> Curves:
    """The curves of a training history. WorkError when it cannot be read."""
    try:
        lines = list(read(path))
        steps = [line for line in lines if line["kind"] == "step"]
        tests = [line for line in lines if "test_accuracy" in line]
        return Curves(
            steps=np.array([line["step"] for line in steps], dtype=np.int64),
            loss=np.array([line["loss"] for line in steps], dtype=np.float64),
            test_steps=np.array([line["step"] for line in tests], dtype=np.int64),
            test_queries=np.array([line["queries"] for line in tests], dtype=np.int64),
            test_accuracy=np.array([line["test_accuracy"] for line in tests], dtype=np.float64),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WorkError(f"training history {path} cannot be read: {error!r}") from error


def smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred moving average over `width` values, over fewer at either end. Shape [n] → [n]."""
    if width <= 1 or len(values) == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    # The window shrinks on both sides at once, so that a slope at the ends is not flattened.
    half = np.minimum(np.minimum(positions, len(values) - 1 - positions), width // 2)
    averages: NDArray[np.float64] = (sums[positions + half + 1] - sums[positions - half]) / (2 * half + 1)
    return averages


def learning_curves(results: Sequence[MethodResult], path: Path) -> None:
    """Training loss, smoothed over the raw one, and test accuracy, against steps: one line per method."""
    with new_figure(path, (9.6, 4.2)) as figure:
        left, right = figure.subplots(1, 2, sharex=True)
        lowest, highest = np.inf, 0.0
        for index, result in enumerate(results):
            history, line = read_history(result.trained.history), line_style(index)
            width = max(1, len(history.steps) // 40) | 1
            if len(results) <= 2:
                left.plot(history.steps, history.loss, color=line["color"], alpha=0.22, linewidth=0.8)
            left.plot(history.steps, smooth(history.loss, width), label=method_name(result), **line)
            line |= {"marker": _MARKERS[index % 7], "markevery": _every(history)}
            right.plot(history.test_steps, history.test_accuracy, **line)
            lowest, highest = min(lowest, *history.loss), max(highest, *history.loss)
        left.set(title="Training loss", xlabel="step", ylabel="cross-entropy (nats)")
        if 0 < _DECADE * lowest < highest:
            left.set_yscale("log")
            _plain_log_axis(left)
        right.set(title="Test accuracy", xlabel="step", ylabel="test accuracy")
        left.set_xlim(left=0)
        left.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        _percent(right)
        legend_below(figure, left, columns=2 if len(results) > 3 else max(1, len(results)))


def losses(
    histories: Mapping[str, Path | None],
    path: Path,
    *,
    title: str,
    unit: str,
    columns: int,
    height: float,
    logarithmic: bool = False,
) -> None:
    """Loss of the batch in training, smoothed, against steps: a line per method by its name; None: no history."""
    with new_figure(path, (7.6, height)) as figure:
        axes = figure.subplots()
        for index, (name, history) in enumerate(histories.items()):
            if history is not None:
                curves = read_history(history)
                width = max(1, len(curves.steps) // 20) | 1
                axes.plot(curves.steps, smooth(curves.loss, width), label=name, **line_style(index))
        axes.set(title=title, xlabel="step", ylabel=unit, yscale="log" if logarithmic else "linear")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        legend_below(figure, axes, columns=columns)


def layer_ratios(pruned: Pruned, path: Path) -> None:
    """The share of every layer that is estimated and that is left out, with the layers' sizes."""
    names = list(pruned.ratios)
    removed = np.array([pruned.ratios[name] for name in names])
    estimated = 1 - removed
    with new_figure(path, (9.6, max(2.4, 1.35 + 0.27 * len(names)))) as figure:
        axes = figure.subplots()
        rows = np.arange(len(names))
        axes.barh(rows, estimated, height=0.74, color=_BLUE, label="estimated")
        axes.barh(rows, removed, left=estimated, height=0.74, color="#D9DEE5", label="left out")
        for row, name in enumerate(names):
            size = pruned.sizes.get(name, 0)
            kept = size - round(pruned.ratios[name] * size)
            axes.text(
                1.012, row, f"{kept:,} of {size:,}", va="center", ha="left", fontsize=8.5, color="#333333",
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        overall = 1 - pruned.sparsity
        axes.axvline(overall, color=_RED, linewidth=1.4, linestyle=(0, (4, 2)), label=f"all layers: {overall:.1%}")
        axes.set_yticks(rows, [name.removesuffix(".weight") for name in names])
        axes.set(xlim=(0, 1), ylim=(len(names) - 0.45, -0.55), xlabel="share of the layer's weights")
        axes.set_title(f"What is estimated per layer ({pruned.method}, {percent(pruned.sparsity)} sparse)")
        axes.text(
            1.012, 1, "estimated weights", va="bottom", ha="left", fontsize=8.5, color="#333333", style="italic",
            transform=axes.transAxes,
        )  # fmt: skip
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        legend_below(figure, axes, columns=3)


def confusion_matrix(evaluated: Evaluated, class_names: Sequence[str], path: Path) -> None:
    """How often each class was taken for each, as shares of the true class; counts are written into small matrices."""
    counts = np.array(evaluated.confusion, dtype=np.int64)
    classes = len(counts)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    labelled = classes <= 40
    side = min(9.5, 3.0 + 0.38 * classes) if labelled else 8.0
    # "compressed" is the layout that knows of axes of a fixed shape.
    with new_figure(path, (side + 1.0, side), layout="compressed") as figure:
        axes = figure.subplots()
        # The square root of a share, so that rare mistakes are seen beside a diagonal near one.
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if labelled:
            names = [str(name) for name in class_names]
            axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names), default=0) > 2 else 0)
            axes.set_yticks(range(classes), names)
            axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
            axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
            axes.grid(which="minor", color="#E3E6EA", linewidth=0.8)
        axes.tick_params(which="both", length=0)
        if classes <= 20:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    dark = shares[row, column] > 0.3
                    axes.text(
                        column, row, f"{count:,}", ha="center", va="center", fontsize=8.5 if classes <= 12 else 6.5,
                        color="white" if dark else "#222222",
                    )  # fmt: skip
        right = int(np.trace(counts))
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(f"Test accuracy {evaluated.accuracy:.2%}: {right:,} of {int(counts.sum()):,} right")
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, ticks=[0, 0.05, 0.25, 0.5, 1])
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)


def accuracy_against_queries(results: Sequence[MethodResult], path: Path) -> None:
    """Test accuracy against the loss evaluations spent, on a logarithmic axis."""
    with new_figure(path, (7.6, 4.4)) as figure:
        axes = figure.subplots()
        for index, result in enumerate(results):
            history = read_history(result.trained.history)
            spent = history.test_queries > 0
            axes.plot(
                history.test_queries[spent],
                history.test_accuracy[spent],
                label=method_name(result),
                marker=_MARKERS[index % 7],
                markevery=_every(history),
                **line_style(index),
            )
        axes.set_xscale("log")
        axes.set(
            title="Test accuracy against queries", xlabel="queries: evaluations of the loss on one batch (log scale)"
        )
        axes.set_ylabel("test accuracy")
        _percent(axes)
        legend_below(figure, axes, columns=2 if len(results) > 1 else 1)


def certified_accuracy(certified: Certified, path: Path) -> None:
    """Certified accuracy against radius, at every radius at which it changes."""
    radii, shares = certified_steps(certified.table)
    with new_figure(path, (7.6, 4.4)) as figure:
        axes = figure.subplots()
        end = max([*certified.accuracy_at, float(radii[-1]) * 1.08, 0.1])
        axes.step([*radii, end], [*shares, 0.0], where="pre", color=_BLUE, label="certified accuracy")
        listed = {radius: share for radius, share in certified.accuracy_at.items() if radius <= end}
        axes.plot(list(listed), list(listed.values()), "o", color=_RED, markersize=5.5, label="reported", clip_on=False)
        for radius, share in listed.items():
            axes.annotate(
                f"{share:.1%}",
                (radius, share),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8.5,
                color="#333333",
            )
        axes.set(xlim=(0, end), title=f"Certified accuracy (σ = {certified.sigma:g}, {certified.examples:,} examples)")
        axes.set(xlabel="radius (ℓ₂, images in [0, 1])", ylabel="certified accuracy", ylim=(0, 1.05))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_yticks(np.arange(0, 1.01, 0.2))
        legend_below(figure, axes, columns=2)


def certified_steps(table: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(radii [m], shares [m]): the share of examples certified at a radius of at least radii[i], radii rising from 0.

    WorkError when the table cannot be read.
    """
    try:
        columns = pq.read_table(table, columns=["label", "predicted", "radius"])
    except (OSError, ValueError, KeyError) as error:
        raise WorkError(f"table of certificates {table} cannot be read: {error}") from error
    label, predicted, radius = (columns[name].to_numpy() for name in ("label", "predicted", "radius"))
    right = np.sort(radius[(predicted == label) & (predicted >= 0)])
    radii = np.unique(np.concatenate([[0.0], right]))
    counts = len(right) - np.searchsorted(right, radii, side="left")
    return radii, counts / max(1, len(radius))


def loss_overlay(estimated: MethodResult, exact: MethodResult, path: Path) -> None:
    """The training losses of two runs on top of each other, and below, their difference step by step."""
    first, second = read_history(estimated.trained.history), read_history(exact.trained.history)
    steps, one, two = np.intersect1d(first.steps, second.steps, return_indices=True)
    difference = first.loss[one] - second.loss[two]
    with new_figure(path, (7.6, 5.4)) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        above.plot(second.steps, second.loss, color=_ORANGE, linewidth=3.2, alpha=0.75, label=method_name(exact))
        above.plot(first.steps, first.loss, color=_BLUE, linewidth=1.1, label=method_name(estimated))
        above.set(title="Training loss, batch by batch", ylabel="cross-entropy (nats)")
        below.axhline(0, color=_GREY, linewidth=1)
        below.plot(steps, difference, color=_BLACK, linewidth=0.9)
        largest = float(np.abs(difference).max()) if len(difference) else 0.0
        typical = float(np.sqrt(np.mean(difference**2))) if len(difference) else 0.0
        below.set_ylim(-1.15 * largest or -1, 1.15 * largest or 1)
        names = (METHOD_NAMES.get(result.method, result.method) for result in (estimated, exact))
        below.set_title(f"{' − '.join(names)}: root mean square {typical:.2g}, largest {largest:.2g}", fontsize=9.5)
        below.set(xlabel="step", ylabel="difference (nats)")
        below.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        legend_below(figure, above, columns=2)


def _every(history: Curves) -> int:
    """Markers on about a dozen evaluations, on each where they are fewer."""
    return max(1, len(history.test_steps) // 12)


def line_style(index: int) -> dict[str, Any]:
    # The main method is the broad line on which a baseline that coincides with it can still be seen.
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "linewidth": 3.2 if index == 0 else 1.6,
        "zorder": 3 if index == 0 else 4,
    }


def _percent(axes: Axes) -> None:
    axes.set_ylim(top=min(1.02, axes.get_ylim()[1] + 0.02), bottom=max(0, axes.get_ylim()[0]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))


def _plain_log_axis(axes: Axes) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)


def legend_below(figure: Figure, axes: Axes, *, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3)


@contextmanager
def new_figure(
    path: Path, size: tuple[float, float], layout: Literal["constrained", "compressed"] = "constrained"
) -> Iterator[Figure]:
    """A figure of `size` inches, written to `path` when the block is left without an error."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        # No time stamps or versions: the same records give the same bytes.
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
