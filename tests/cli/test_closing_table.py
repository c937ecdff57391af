"""The closing table: no number is cut, however narrow the terminal."""

import io

import pytest
from rich.console import Console

from flows.closing_table import closing_tables

COLUMNS = ("method", "MAE", "relative, %", "spectrum", "to SOL-FO", "queries", "solver steps", "training")
ROWS = (
    ("SRC", "0.1469", "10.5", "0.34", "–", "0", "0", "0.0 s"),
    ("SOL-ZO-split", "0.0931±0.0054", "6.7±0.4", "0.12±0.00", "101±13 %", "125,600", "1,307,520", "2 min 21 s"),
)


@pytest.mark.parametrize(("width", "tables", "lines"), [(140, 1, 1), (100, 1, 1), (88, 1, 2), (80, 2, 1), (30, 6, 1)])
def test_everything_is_shown_in_as_many_tables_as_it_takes(width: int, tables: int, lines: int) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width)
    found = list(closing_tables(COLUMNS, ROWS, width, "demo"))
    for table in found:
        console.print(table)
    shown = file.getvalue()
    assert all(len(line) <= width for line in shown.splitlines())
    assert "…" not in shown and all(cell in shown for row in ROWS for cell in row)
    assert len(found) == tables and shown.count("SOL-ZO-split") == tables
    assert shown.splitlines()[0].strip() == "demo"
    heading = next(number for number, line in enumerate(shown.splitlines()) if "───" in line)
    assert heading == 1 + lines
