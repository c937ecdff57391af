"""The picture of a study; see `tasks.plots`."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.plots import legend_below, line_style, new_figure
from tasks.records import Outcome


def measure_by_point(
    points: Mapping[str, Sequence[Outcome]], vary: Mapping[str, Any], measure: str, path: Path
) -> None:
    """A measure with its standard deviation over the seeds: against the last varied key that is a number, a line for
    each combination of the others; where nothing varied is a number, a row for every point."""
    axis = next((key for key, values in reversed(vary.items()) if len(values) > 1 and _numbers(values)), None)
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for row, (label, several) in enumerate(points.items()):
        values = values_of(several, measure)
        place = float(row) if axis is None else float(several[0].values[axis])
        others = ", ".join(str(value) for key, value in several[0].values.items() if key != axis)
        if values:
            lines.setdefault(label if axis is None else others, []).append((place, values))
    height = max(2.2, 1.2 + 0.4 * len(points)) if axis is None else 4.0
    with new_figure(path, (7.6, height)) as figure:
        axes = figure.subplots()
        for index, (name, found) in enumerate(lines.items()):
            found.sort(key=lambda each: each[0])
            places = [place for place, _ in found]
            means = [statistics.mean(values) for _, values in found]
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in found]
            if axis is None:
                axes.errorbar(
                    means, places, xerr=spread, fmt="o", capsize=4, elinewidth=1.2, color=line_style(0)["color"]
                )
            else:
                axes.errorbar(
                    places,
                    means,
                    yerr=spread,
                    marker="o",
                    capsize=4,
                    elinewidth=1.2,
                    label=name or None,
                    **line_style(index),
                )
            for place, values in found:
                single = (values, [place] * len(values)) if axis is None else ([place] * len(values), values)
                axes.plot(*single, "o", color="#8A8F98", markersize=3, zorder=3, linestyle="")
        if axis is None:
            axes.set_yticks(range(len(points)), list(points))
            axes.set(xlabel=measure, ylim=(len(points) - 0.5, -0.5))
        else:
            axes.set(xlabel=axis, ylabel=measure)
            if any(lines):
                legend_below(figure, axes, columns=min(4, len(lines)))
        axes.set_title(measure)


def values_of(several: Sequence[Outcome], measure: str) -> list[float]:
    """The measure of the runs that have it."""
    studied = [outcome.studied.metrics for outcome in several if outcome.studied is not None]
    return [metrics[measure] for metrics in studied if measure in metrics]


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
