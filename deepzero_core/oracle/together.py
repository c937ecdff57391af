"""Calls that wait for somebody else, several at the same time, as if they were made one after the other."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(function: Callable[[T], R], items: Sequence[T], at_once: int) -> list[R]:
    """[function(item) for item in items], at most `at_once` of them at the same time, each on a thread.

    Where one fails nothing more is begun; what has begun is waited for, and the first failure in order is raised.
    """
    if at_once == 1 or len(items) < 2:
        return [function(item) for item in items]
    found: dict[int, R] = {}
    failures: dict[int, BaseException] = {}
    lock, coming, stopped = threading.Lock(), iter(range(len(items))), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                number = next(coming, None)
            if number is None:
                return
            try:
                found[number] = function(items[number])
            except BaseException as error:  # raised where the list is waited for
                failures[number] = error
                stopped.set()

    # Daemons: a person who interrupts does not wait for an answer that may never come.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stopped.set()
    if failures:
        raise failures[min(failures)]
    return [found[number] for number in range(len(items))]
