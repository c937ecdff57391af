"""Requests to stop that arrive where Python drops exceptions."""

import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from prefect.exceptions import TerminationSignal

from infra.heeded import heeded


@contextmanager
def in_a_collection(number: signal.Signals, handler: Callable[..., None]) -> Iterator[None]:
    """Within, the next collection of garbage is interrupted by that signal, once."""

    def callback(phase: str, info: object) -> None:
        gc.callbacks.remove(callback)
        signal.raise_signal(number)

    before = signal.signal(number, handler)
    gc.callbacks.append(callback)
    try:
        yield
    finally:
        signal.signal(number, before)


def stopped(number: int, frame: object) -> None:
    raise TerminationSignal(number)


@pytest.mark.parametrize(
    ("number", "handler", "error"),
    [
        (signal.SIGTERM, stopped, TerminationSignal),
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
    ],
)
def test_a_request_that_arrives_in_a_collection_is_heeded(
    number: signal.Signals, handler: Callable[..., None], error: type[BaseException]
) -> None:
    with in_a_collection(number, handler), heeded(), pytest.raises(error):
        gc.collect()  # here the exception is dropped
        time.sleep(30)


def test_python_alone_would_lose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))
    with in_a_collection(signal.SIGTERM, stopped):
        gc.collect()
        time.sleep(0.5)
    assert dropped == [TerminationSignal]


def test_other_errors_are_shown_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("in a destructor")

    shown: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(unraisable.exc_type))
    before = sys.unraisablehook
    with heeded():
        Broken()
    assert shown == [ValueError] and sys.unraisablehook is before
