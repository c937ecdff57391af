"""What may be asked, how fast, what it costs, and which answers are taken for answers."""

import json
import pickle
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring import Server, images, network, says

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.oracle import (
    BlackBoxUnavailableError,
    FunctionOracle,
    MemoryAccount,
    Metered,
    ModuleOracle,
    QueryBudgetError,
    ResponseCache,
    Statistics,
    StoredAccount,
    Usage,
)
from deepzero_core.oracle.account import _SCHEMA
from deepzero_core.oracle.rate import MemoryBookings, Pace


class Recording:
    """A function and the sizes of the questions it was asked."""

    __name__ = "recording"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.sizes.append(len(x))
        flat = x.reshape(len(x), -1)
        return np.stack([flat[:, 0], flat[:, 1], flat.sum(1)], 1)


def recording(**settings: object) -> tuple[list[int], Metered]:
    function = Recording()
    return function.sizes, Metered(FunctionOracle(function, batch_size=4, version="1"), **settings)


@pytest.mark.parametrize("limit", [None, 3, 9])
def test_questions_are_cut_to_what_the_box_takes(limit: int | None) -> None:
    sizes, box = recording(batch_size=limit)
    whole, parts = box.query(images(10)), [box.query(x[None]) for x in images(10)]
    assert torch.equal(whole, torch.cat(parts))
    assert sizes[:-10] == ([3, 3, 3, 1] if limit == 3 else [4, 4, 2])
    assert box.statistics.calls == len(sizes)


@pytest.mark.parametrize("cached", [False, True], ids=["bare", "with a cache"])
def test_the_budget_is_exact(cached: bool, tmp_path: Path) -> None:
    sizes, box = recording(budget=12, cache=ResponseCache(tmp_path / "c") if cached else None)
    box.query(images(7))
    before = list(sizes)
    with pytest.raises(QueryBudgetError, match=r"a question of 6 examples .* 7 of 12 are spent"):
        box.query(images(6, seed=2))
    assert sizes == before, "nothing was sent, also not the first four that could have been paid for"
    assert box.budget_left == 5
    box.query(images(5, seed=3))
    assert (box.budget_left, sum(sizes), box.statistics.examples) == (0, 12, 12)
    with pytest.raises(QueryBudgetError):
        box.query(images(1, seed=4))
    if cached:
        box.query(images(7))
        assert (sum(sizes), box.statistics.cached) == (12, 7)
    box.close()


def test_budget_errors_are_failures_of_the_work() -> None:
    assert QueryBudgetError("").exit_code == BlackBoxUnavailableError("").exit_code == 1


def test_a_server_that_goes_away_takes_nothing_with_it(server: Server, tmp_path: Path) -> None:
    """Calls answered before are paid and kept, the rest is neither; the next process goes on where it ended."""
    account = StoredAccount(tmp_path / "account", "run")
    settings = {"batch_size": 2, "budget": 9, "account": account}
    first = Metered(server.oracle(patience=2), cache=ResponseCache(tmp_path / "cache"), **settings)
    good = says(json.dumps({"predictions": [[1.0, 2.0, 3.5]] * 2}))
    server.script = [good, good, *[says("gone", 503)] * 50]
    with pytest.raises(BlackBoxUnavailableError, match="503"):
        first.query(images(8))
    assert (first.statistics.examples, first.statistics.calls, first.budget_left) == (4, 2, 5)
    assert first.statistics.retries == len(server.waits) > 0
    first.close()

    server.script, asked = [], len(server.requests)
    second = Metered(server.oracle(), cache=ResponseCache(tmp_path / "cache"), **settings)
    answer = second.query(images(8))
    assert answer[:4].tolist() == [[1.0, 2.0, 3.5]] * 4, "these were paid for"
    with torch.no_grad():
        torch.testing.assert_close(answer[4:], network()(images(8)[4:]).double(), rtol=1e-6, atol=1e-6)
    assert len(server.requests) - asked == 2
    assert (second.statistics.examples, second.statistics.cached, second.budget_left) == (8, 4, 1)
    second.close()


def test_a_wrong_answer_is_paid_for() -> None:
    box = Metered(FunctionOracle(lambda x: np.full((len(x), 3), np.nan)), budget=10)
    with pytest.raises(WorkError, match="6 numbers of 6 that are not finite"):
        box.query(images(2))
    assert box.budget_left == 8


def test_what_it_cost() -> None:
    _, box = recording(price_per_thousand=1.5)
    box.query(images(10))
    found = box.statistics
    assert found == Statistics(10, 3, 0, 0, found.seconds, 0.015)
    assert found.seconds > 0
    assert recording()[1].statistics.cost is None


def test_counting_goes_on_from_a_checkpoint() -> None:
    _, box = recording(budget=20, account=MemoryAccount(Usage(examples=15, calls=2)))
    box.query(images(4))
    assert (box.statistics.examples, box.statistics.calls, box.budget_left) == (19, 3, 1)


def test_a_budget_is_not_copied(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="give it a StoredAccount"):
        pickle.dumps(Metered(ModuleOracle(network()), budget=10))
    settings = {"budget": 10, "account": StoredAccount(tmp_path / "a", "run"), "cache": ResponseCache(tmp_path / "c")}
    with Metered(ModuleOracle(network()), **settings) as box, pickle.loads(pickle.dumps(box)) as other:
        other.query(images(6))
        assert box.budget_left == other.budget_left == 4
        box.query(images(6))
        assert box.statistics.cached == 6
        with pytest.raises(QueryBudgetError):
            box.query(images(5, seed=9))


def test_accounts_are_kept_apart_and_a_damaged_one_is_not_forgotten(tmp_path: Path) -> None:
    one, two = (StoredAccount(tmp_path / "a", name) for name in ("one", "two"))
    one.add(Usage(examples=3))
    two.add(Usage(examples=5, seconds=0.5))
    assert (one.usage, two.usage) == (Usage(examples=3), Usage(examples=5, seconds=0.5))
    with pytest.raises(QueryBudgetError):
        one.add(Usage(examples=1), budget=3)
    assert one.usage.examples == 3
    one.close()
    two.close()
    (tmp_path / "a").write_bytes(b"no database " * 100)
    with pytest.raises(RequestError, match=r"query account .* is damaged"):
        StoredAccount(tmp_path / "a", "one")


def test_the_rate_is_kept() -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    pace = Pace("examples_per_second", 8.0, MemoryBookings(lambda: now[0]), sleep=sleep)
    for units, wait in [(4, 0), (8, 0.5), (1, 1.0), (1, 0.125)]:
        slept.clear()
        pace.wait(units)
        assert sum(slept) == pytest.approx(wait)
    now[0] += 60
    slept.clear()
    pace.wait(800)
    assert slept == [], "after a rest nothing has to be waited for, and the rest counts for no more than that"
    pace.wait(1)
    assert slept == [pytest.approx(100)]


def test_the_rate_is_that_of_all_who_share_the_account(tmp_path: Path) -> None:
    now = [1e9]
    one, two = (StoredAccount(tmp_path / "a", "images", clock=lambda: now[0]) for _ in range(2))
    other = StoredAccount(tmp_path / "a", "other", clock=lambda: now[0])
    assert [account.book("calls", 0.5) for account in (one, two, one)] == [0.0, 0.5, 1.0]
    assert (one.book("examples", 3.0), other.book("calls", 0.5)) == (0.0, 0.0), "each for itself"
    now[0] += 1.25
    assert [account.book("calls", 0.5) for account in (two, one)] == [0.25, 0.75]
    now[0] -= 3600  # the clock is set back
    assert [account.book("calls", 0.5) for account in (two, one)] == [1.25, 1.75]
    for account in (one, two, other):
        account.close()


def test_an_account_from_before_there_were_paces(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a") as connection:
        connection.execute(_SCHEMA[0])
        connection.execute("INSERT INTO accounts VALUES ('run', 5, 1, 0, 0, 0.5)")
        connection.execute("PRAGMA application_id = 0x447A4163")
    connection.close()
    account = StoredAccount(tmp_path / "a", "run")
    assert (account.usage.examples, account.book("calls", 1.0)) == (5, 0.0)
    account.close()


def test_the_box_is_asked_at_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    _, box = recording(examples_per_second=100.0, calls_per_second=5.0)
    waited: list[tuple[str, int]] = []
    monkeypatch.setattr(box._by_example, "wait", lambda units: waited.append(("example", units)))
    monkeypatch.setattr(box._by_call, "wait", lambda units: waited.append(("call", units)))
    box.query(images(6))
    assert waited == [("example", 4), ("call", 1), ("example", 2), ("call", 1)]


ROWS = {
    "sums to 0.9": ([[0.5, 0.4]] * 2, "a row 0 that sums to 0.9"),
    "negative": ([[0.5, 0.5], [1.1, -0.1]], "numbers from -0.1 to 1.1"),
    "logits": ([[3.0, -2.0]] * 2, "numbers from -2 to 3; .* answers='logits'"),
    "percent": ([[60.0, 40.0]] * 2, "numbers from 40 to 60"),
}


@pytest.mark.parametrize(("rows", "sentence"), ROWS.values(), ids=ROWS)
def test_rows_that_are_no_probabilities(rows: list[list[float]], sentence: str) -> None:
    box = Metered(FunctionOracle(lambda x: rows, answers="probabilities", name="mine"))
    with pytest.raises(RequestError, match=f"the black box mine answered {sentence}"):
        box.query(images(2))


@pytest.mark.parametrize("rows", [[[0.3333, 0.3333, 0.3333]] * 2, [[1.0000001, -1e-8, 0.0]] * 2, [[1, 0, 0]] * 2])
def test_rounded_probabilities_are_taken(rows: list[list[float]]) -> None:
    assert Metered(FunctionOracle(lambda x: rows, answers="probabilities")).query(images(2)).shape == (2, 3)


def test_probabilities_called_logits_are_noticed_once() -> None:
    box = Metered(FunctionOracle(lambda x: [[0.25, 0.75]] * len(x)))
    box.query(images(2))
    with pytest.warns(UserWarning, match="answers='probabilities'"):
        box.query(images(8))
    box.query(images(8))


def test_settings_are_checked() -> None:
    for settings, sentence in [
        ({"budget": 0}, "budget must be a whole number of at least 1, not 0"),
        ({"budget": 1e6}, "budget must be a whole number"),
        ({"budget": True}, "budget must be"),
        ({"batch_size": -1}, "batch_size must be"),
        ({"classes": 1}, "classes must be a whole number of at least 2"),
        ({"examples_per_second": 0.0}, "examples_per_second must be a number above 0"),
        ({"calls_per_second": float("inf")}, "calls_per_second must be"),
        ({"price_per_thousand": -1.0}, "price_per_thousand must be"),
    ]:
        with pytest.raises(RequestError, match=sentence):
            recording(**settings)
    with pytest.raises(RequestError, match=r"of shape \[2, 3\]; expected .* \[2, 10\]"):
        recording(classes=10)[1].query(images(2))
