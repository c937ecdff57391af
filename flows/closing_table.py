"""The closing table of a run at any width of the terminal: headings break, numbers never.

Where even that is too wide, the columns go on in a second table below, the first column again in front.
"""

import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

_GAP = 1


def closing_tables(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, title: str) -> Iterator[Table]:
    """The columns in as many tables as `width` characters need, most often one."""
    cells = list(zip(*rows, strict=True))
    narrowest = [_longest((*heading.split(), *column)) for heading, column in zip(columns, cells, strict=True)]
    whole = [_longest((heading, *column)) for heading, column in zip(columns, cells, strict=True)]
    for number, block in enumerate(_blocks(narrowest, width)):
        table = Table(
            title=title if number == 0 else None, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False
        )
        room = sum(whole[index] + _GAP for index in block) - _GAP <= width
        for index in block:
            heading = columns[index] if room else textwrap.fill(columns[index], narrowest[index])
            table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[index] for index in block))
        yield table


def _longest(texts: Sequence[str]) -> int:
    return max(len(text) for text in texts)


def _blocks(narrowest: Sequence[int], width: int) -> Iterator[list[int]]:
    """By the columns' widths, which stand together: the first, and at least one other, more where there is room."""
    block, taken = [0], narrowest[0]
    for index, column in enumerate(narrowest[1:], 1):
        if len(block) > 1 and taken + _GAP + column > width:
            yield block
            block, taken = [0], narrowest[0]
        block.append(index)
        taken += _GAP + column
    yield block
