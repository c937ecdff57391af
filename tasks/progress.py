"""One line per stage: a live bar in a terminal, a line now and then where there is none."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_PLAIN_EVERY_S = 15.0


class Progress:
    """Progress of one stage over a known number of units of work. Use as a context manager."""

    def __init__(self, stage: str, total: int, done: int = 0) -> None:
        self._stage, self._total, self._done, self._first = stage, total, done, done
        self._started = self._printed = time.monotonic()
        self._console = Console(file=sys.stdout)
        self._bar = _bar(self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task(stage, total=total, completed=done, note="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        else:
            self._print(f"0 of {self._total}" if not self._done else f"goes on at {self._done} of {self._total}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print(f"done in {_clock(time.monotonic() - self._started)}")

    def advance(self, note: str = "") -> None:
        """One unit is done; `note` says how it stands."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=note)
            return
        now = time.monotonic()
        if now - self._printed >= _PLAIN_EVERY_S:
            self._printed = now
            left = (now - self._started) / max(1, self._done - self._first) * (self._total - self._done)
            self._print(f"{self._done} of {self._total}, {note}, {_clock(left)} left")

    def _print(self, text: str) -> None:
        print(f"{self._stage}: {text}", flush=True)


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("[bold]{task.description:<36}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
