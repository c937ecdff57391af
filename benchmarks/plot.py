"""The accuracy curves as a picture: error against float64 CGE, and against the derivative."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.accuracy import EXACT, PAPER, Curve
from benchmarks.measure import MU

STYLES = {
    EXACT: ("float64 CGE: bias of the difference", "#333333", (0, (1, 1.5)), ""),
    PAPER: ("paper: float32 losses", "#D55E00", "-", "o"),
    "value": ("engine, value", "#E69F00", (0, (5, 1.5)), "s"),
    "bfloat16": ("engine, bfloat16", "#009E73", "-", "^"),
    "float32": ("engine, float32", "#0072B2", "-", "D"),
}
"""Label, colour (Okabe and Ito 2008), dashes and marker by name of the curve."""


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Two panels, log–log, every curve labelled at its end; PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(12.5, 4.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        rounded = [curve for curve in curves if curve.name != EXACT]
        ends = [
            (left, _panel(left, "Against float64 CGE at the same μ", rounded, "against_cge")),
            (right, _panel(right, "Against the derivative (autograd)", curves, "against_derivative")),
        ]
        left.set_ylabel("relative error of the gradient estimate")
        for axes, labels in ends:  # only now are the common limits known
            _label(axes, labels, min(curves[0].mus))
        figure.savefig(path)


def _panel(axes: Axes, title: str, curves: Sequence[Curve], which: str) -> dict[str, tuple[float, str]]:
    """Draw the curves; the last error and the colour of each, by label."""
    axes.set_title(title, fontweight="bold")
    ends = {}
    for curve in curves:
        label, colour, dashes, marker = STYLES.get(curve.name, (curve.name, "#000000", "-", "v"))
        errors = getattr(curve, which)
        style = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4, "linewidth": 1.8}
        axes.loglog(curve.mus, errors, zorder=3 if curve.name == EXACT else 2, **style)
        ends[label] = (min(zip(curve.mus, errors, strict=True))[1], colour)
    axes.set(xlabel="smoothing parameter μ")
    axes.invert_xaxis()
    axes.grid(color="#E3E6EA", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(MU, color="#9AA0A6", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate("paper's μ", (MU, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points")
    return ends


def _label(axes: Axes, ends: dict[str, tuple[float, str]], at: float) -> None:
    """Names beside the last points, pushed apart where they would lie on each other."""
    above = -float("inf")
    low, high = axes.transLimits.inverted().transform([(0, 0), (0, 1)])[:, 1]
    for label, (error, colour) in sorted(ends.items(), key=lambda end: end[1][0]):
        height = (axes.transScale.transform((at, error))[1] - low) / (high - low)
        above = max(height, above + 0.06)
        axes.annotate(
            label,
            (at, error),
            xytext=(1.02, above),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
        )
