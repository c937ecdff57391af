"""Every case, again and again, and the table of what was lost."""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.bench import Bench, bench
from benchmarks.faults.cases import CASES, Case, Skipped
from benchmarks.faults.verdict import losses, said_badly


@dataclass
class Row:
    """One case. times: how often it was done; lost: what, in words, once for each time that anything was."""

    case: str
    about: str
    expected: str
    times: int = 0
    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def once(bench: Bench, case: Case, draw: random.Random) -> list[str]:
    """Do it once; what was lost, beside the run that was left alone."""
    reference = bench.left_alone()
    try:
        home, said = case.inject(bench, draw)
        return losses(home, reference) + said_badly(*said)
    finally:
        bench.clear()


def measure(names: Sequence[str], repeats: int, report: Callable[[str], None]) -> list[Row]:
    """Every case `repeats` times, at moments drawn from a generator of its own."""
    rows = [Row(name, CASES[name].about, CASES[name].expected) for name in names]
    with tempfile.TemporaryDirectory(prefix="deepzero-faults-") as folder, bench(Path(folder)) as made:
        report("the run that is left alone")
        made.left_alone()
        for turn in range(repeats):
            for row in rows:
                started = time.monotonic()
                report(f"{row.about}, {turn + 1} of {repeats}")
                try:
                    lost = once(made, CASES[row.case], random.Random(f"{row.case} {turn}"))
                except Skipped as reason:
                    report(f"  skipped: {reason}")
                    continue
                except Exception as error:
                    lost = [f"not as expected: {type(error).__name__}: {str(error)[:2000]}"]
                row.times += 1
                row.seconds.append(time.monotonic() - started)
                row.lost += ["; ".join(lost)] if lost else []
                report(f"  {'; '.join(lost) or 'nothing lost'}")
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| what was done | how often | what is seen | lost |", "|---|---:|---|---|"]
    lines += [f"| {row.about} | {row.times} | {row.expected} | {_said(row.lost)} |" for row in rows if row.times]
    return "\n".join(lines)


def documents(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _said(lost: Sequence[str]) -> str:
    return f"{len(lost)} times: {lost[0]}" if lost else "nothing"
