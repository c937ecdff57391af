"""One line per stage: a live bar in a terminal, a line now and then where there is none; and a gauge in Prefect.

What is printed is logged as well: the log of a flow run that a worker executes is how others see it.
"""

import logging
import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tasks.artifacts import Gauge

_log = logging.getLogger(__name__)

_PLAIN_EVERY_S = (15.0, 300.0)
_PLAIN_SHARE = 0.02
"""Of the time so far goes between two lines, within these bounds: of a run of days nobody reads four in a minute."""
_WIDTH = 38


class Progress:
    """Progress of a stage's units of work. Use as a context manager; the line that remains is `concluded`'s.

    `unit_seconds`, where it is known beforehand, says how long it will take before the first unit is done.
    """

    def __init__(self, stage: str, total: int, done: int = 0, unit_seconds: float | None = None) -> None:
        self._stage, self._total, self._done, self._first = stage, total, done, done
        self._expected = None if unit_seconds is None else unit_seconds * (total - done)
        self._started = self._printed = time.monotonic()
        self._bar, self._gauge = _bar(), Gauge(stage)
        note = "" if self._expected is None else f"about {_clock(self._expected)}"
        self._task = self._bar.add_task(stage, total=total, completed=done, note=note)

    def __enter__(self) -> Self:
        if self._bar.console.is_terminal:
            self._bar.start()
        elif self._expected is not None and self._expected >= _PLAIN_EVERY_S[0]:
            _say(self._stage, f"{self._done} of {self._total}, about {_clock(self._expected)} left")
        self._gauge.show(self._percent)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()
        if kind is None:
            self._gauge.show(self._percent, last=True)

    def advance(self, note: str = "") -> None:
        """One unit is done; `note` says how it stands."""
        self._done += 1
        self._bar.update(self._task, completed=self._done, note=note)
        self._gauge.show(self._percent)
        now = time.monotonic()
        so_far, (often, seldom) = now - self._started, _PLAIN_EVERY_S
        if not self._bar.console.is_terminal and now - self._printed >= min(max(often, _PLAIN_SHARE * so_far), seldom):
            self._printed = now
            left = so_far / (self._done - self._first) * (self._total - self._done)
            _say(self._stage, f"{self._done} of {self._total}, {note}, {_clock(left)} left")

    @property
    def _percent(self) -> float:
        return 100 * self._done / self._total if self._total else 100.0


def concluded(stage: str, seconds: float) -> None:
    """The line of a stage that is done."""
    _say(stage, f"done in {_clock(seconds)}")


def skipped(stage: str) -> None:
    """The line of a stage that had nothing to do."""
    _say(stage, "unchanged, skipped")


def _say(stage: str, text: str) -> None:
    line = f"{stage:<{_WIDTH}} {text}"
    print(line, flush=True)
    _log.info("%s", line)


def _bar() -> Bar:
    return Bar(
        TextColumn(f"{{task.description:<{_WIDTH}}}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}"),
        console=Console(file=sys.stdout),
        transient=True,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
