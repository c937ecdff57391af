"""Rows as a table: times, how many times longer the baselines take, and the bars beside the ratios."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.results import Row
from benchmarks.timing import Timing

WIDTH = 150


def show(rows: Sequence[Row]) -> None:
    """Print every row; * marks what was timed on a sample and scaled."""
    names = list(dict.fromkeys(name for row in rows for name in row.baselines))
    table = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for column in ("case", "engine", *names, "error", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        table.add_row(
            f"{row.about}\n{row.precision}, {row.coordinates:,} coordinates",
            f"{_time(row.engine)}\n±{row.engine.spread / 2:.0%}",
            *(_baseline(row, name) for name in names),
            _errors(row),
            _work(row),
        )
    console = Console(width=WIDTH)
    console.print(table)
    console.print(
        "Medians, ± half the spread. ×: how many times longer than the engine. *: on a sample, scaled.\n"
        "error: of the engine against float64, below it that of feature reuse in float32.\n"
        "GFLOP/s: feature reuse's work in the engine's time, below it the share of what a matrix product reaches."
    )
    for row in rows:
        for note in row.notes:
            console.print(f"{row.case}: {note}", highlight=False)


def _baseline(row: Row, name: str) -> str:
    if name not in row.baselines:
        return "–"
    lines = [_time(row.baselines[name]), f"{row.ratios[name]:.1f}×"]
    if verdict := row.verdicts.get(name):
        lines += verdict.split(": ")
    return "\n".join(lines)


def _time(timing: Timing) -> str:
    return f"{timing.median:.3g} s{'*' if timing.sampled else ''}"


def _errors(row: Row) -> str:
    if row.error is None:
        return "same bits"
    shown = f"{row.error:.1e}" if row.agrees else f"[bold red]{row.error:.1e} disagrees[/]"
    return shown if row.paper_error is None else f"{shown}\n{row.paper_error:.1e}"


def _work(row: Row) -> str:
    if row.effective is None or row.share_of_peak is None:
        return "–"
    return f"{row.effective / 1e9:.0f}\n{row.share_of_peak:.0%} of peak"
