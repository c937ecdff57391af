"""Several requests at the same time: the same questions, the same answers in order, the same bill."""

import json
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from scoring import Handler, Reply, Server, images, says, score

from deepzero_core.errors import RequestError
from deepzero_core.oracle import BlackBoxUnavailableError, Metered, QueryBudgetError, ResponseCache
from deepzero_core.oracle.together import in_order


class Meeting:
    """Scores no request before so many have come; in the order in which they came, or from the last to the first."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=20)
        self._turn = threading.Condition()
        self._left = count

    def __call__(self, handler: Handler, body: bytes) -> None:
        place = self._barrier.wait()
        with self._turn:
            self._turn.wait_for(lambda: self._left == place + 1, timeout=20)
            score(handler, body)
            self._left -= 1
            self._turn.notify_all()


def bodies(server: Server) -> list[bytes]:
    return sorted(body for _, _, body in server.requests)


@pytest.mark.parametrize("cached", [False, True], ids=["bare", "with a cache"])
def test_requests_are_in_flight_together_and_answers_in_order(server: Server, cached: bool, tmp_path: Path) -> None:
    with Metered(server.oracle(batch_size=2)) as alone:
        wanted = alone.query(images(11))
    asked = bodies(server)
    server.requests.clear()
    meeting: Reply = Meeting(3)
    server.script = [meeting, meeting, meeting]
    cache = ResponseCache(tmp_path / "c") if cached else None
    with Metered(server.oracle(batch_size=2, concurrency=3), budget=11, cache=cache) as box:
        assert torch.equal(box.query(images(11)), wanted)
        assert bodies(server) == asked, "the same requests"
        assert (box.statistics.examples, box.statistics.calls, box.budget_left) == (11, 6, 0)
        if cached:
            assert torch.equal(box.query(images(11)), wanted)
            assert (len(server.requests), box.statistics.cached) == (6, 11)
        with pytest.raises(QueryBudgetError):
            box.query(images(1, seed=2))


def test_never_more_requests_than_allowed(server: Server) -> None:
    now, most, lock = [0], [0], threading.Lock()

    def counted(handler: Handler, body: bytes) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        score(handler, body)

    server.script = [counted] * 12
    with Metered(server.oracle(batch_size=1, concurrency=3)) as box:
        box.query(images(12))
    assert 1 <= most[0] <= 3


def test_a_server_that_goes_away_costs_what_it_answered(server: Server, tmp_path: Path) -> None:
    """Of requests in flight together some are answered and some never are: the bill is exact, and so is the cache."""
    first, second = threading.Event(), threading.Event()

    def answered(handler: Handler, body: bytes) -> None:
        second.wait(20)
        handler.send(200, json.dumps({"predictions": [[1.0, 2.0, 3.5]] * 2}).encode())

    def gone(handler: Handler, body: bytes) -> None:
        first.set()
        second.set()
        handler.send(503, b"gone")

    server.script = [answered, gone, *[says("gone", 503)] * 60]
    oracle = server.oracle(batch_size=2, concurrency=2, patience=2)
    with Metered(oracle, budget=20, cache=ResponseCache(tmp_path / "c")) as box:
        with pytest.raises(BlackBoxUnavailableError, match="503"):
            box.query(images(12))
        # One of the first two was answered, and nothing after it.
        assert (box.statistics.examples, box.statistics.calls, box.budget_left) == (2, 1, 18)
        assert box.statistics.retries == len(server.waits) > 0
        server.script = []
        box.query(images(12))
        assert (box.statistics.examples, box.statistics.cached) == (12, 2)


def test_all_share_the_rate(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    booked: list[float] = []
    with Metered(server.oracle(batch_size=1, concurrency=4), calls_per_second=200.0) as box:
        pace = box._by_call
        assert pace is not None
        monkeypatch.setattr(pace, "_sleep", booked.append)
        monkeypatch.setattr(pace._bookings._bookings, "_clock", lambda: 100.0)
        box.query(images(8))
    assert sorted(booked) == pytest.approx([number / 200 for number in range(1, 8)])


def test_a_copy_has_connections_of_its_own(server: Server) -> None:
    with server.oracle(batch_size=2, concurrency=3, sleep=time.sleep) as first:
        with pickle.loads(pickle.dumps(first)) as second:
            assert torch.equal(Metered(second).query(images(7)), Metered(first).query(images(7)))
        assert second.concurrency == 3


@pytest.mark.parametrize("concurrency", [0, 1.5, True])
def test_the_number_is_checked(server: Server, concurrency: object) -> None:
    with pytest.raises(RequestError, match="concurrency must be a whole number of at least 1"):
        server.oracle(concurrency=concurrency)


@pytest.mark.parametrize("at_once", [1, 2, 5, 50])
def test_results_come_in_order(at_once: int) -> None:
    def slow(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number**2

    assert in_order(slow, range(17), at_once) == [number**2 for number in range(17)]


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_first_failure_in_order_is_raised_and_nothing_more_is_begun(at_once: int) -> None:
    begun: list[int] = []
    met = threading.Barrier(at_once, timeout=20)

    def failing(number: int) -> int:
        begun.append(number)
        if number < at_once:
            met.wait()
        if number < 3:
            time.sleep(0.01 * (3 - number))
            raise ValueError(str(number))
        return number

    with pytest.raises(ValueError, match="0"):
        in_order(failing, range(100), at_once)
    assert sorted(begun) == list(range(at_once))
