"""What a stage shows: plain lines where there is no terminal, one line when it is done."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from tasks import progress
from tasks.progress import Progress, concluded, skipped


def test_a_stage_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    concluded("train cge", 83.4)
    skipped("evaluate cge")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"train cge +done in 1:23", lines[0])
    assert re.fullmatch(r"evaluate cge +unchanged, skipped", lines[1])
    assert lines[0].index("done") == lines[1].index("unchanged"), "in columns"


def test_a_long_title_keeps_its_distance(capsys: pytest.CaptureFixture[str]) -> None:
    concluded("evaluate first-order-sparse-gradients", 0.2)
    assert re.fullmatch(r"evaluate first-order-sparse-gradients +done in 0:00\n", capsys.readouterr().out)


def test_where_there_is_no_terminal_a_line_comes_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress("train cge", total=100_000, done=6) as bar:
        for step in range(1, 7201):
            now[0] = 10.0 * step
            bar.advance(f"loss {step}")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"train cge +8 of 100000, loss 2, 277:45:20 left", lines[0])
    assert re.fullmatch(r"train cge +10 of 100000, loss 4, 277:45:00 left", lines[1]), "every fifteen seconds at first"
    assert re.fullmatch(r"train cge +7177 of 100000, loss 7171, 257:50:30 left", lines[-1])
    assert len(lines) == 363, "every five minutes in the end: 20 hours"


def test_what_is_expected_is_said_before_the_first_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress("train cge", total=10, done=6, unit_seconds=30.0):
        pass
    assert re.fullmatch(r"train cge +6 of 10, about 2:00 left\n", capsys.readouterr().out)
    with Progress("train cge", total=10, unit_seconds=1.0):
        pass
    assert capsys.readouterr().out == "", "over before anybody has read it"


def test_a_quick_stage_prints_nothing_on_its_way(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("certify", total=100) as bar:
        for _ in range(100):
            bar.advance()
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_a_bar_with_the_time_left_and_clears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    with Progress("train cge", total=4) as bar:
        for _ in range(3):
            bar.advance("loss 0.25")
    shown = screen.getvalue()
    assert "3/4" in shown and "left" in shown and "loss 0.25" in shown
    assert shown.rstrip().endswith("\x1b[2K"), "the bar gives way to the line that concludes the stage"
