"""Answers that were paid for are there again, whatever happened in between."""

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scoring import images

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.oracle import FunctionOracle, Metered, ResponseCache, StoredAccount
from deepzero_core.oracle.cache import keys_of

TYPES = [torch.float32, torch.float64]


def asked() -> tuple[list[int], FunctionOracle]:
    sizes: list[int] = []

    def function(x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        flat = x.reshape(len(x), -1)
        return np.stack([flat[:, 0] * 3, flat.sum(1)], 1)

    return sizes, FunctionOracle(function, version="1")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_cached_answers_are_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    sizes, oracle = asked()
    x = images(6).to(dtype)
    with Metered(oracle, cache=ResponseCache(tmp_path / "cache")) as box:
        first = box.query(x)
    with Metered(oracle, cache=ResponseCache(tmp_path / "cache")) as box:
        again = box.query(x.flip(0)).flip(0)
        assert (box.statistics.examples, box.statistics.calls, box.statistics.cached) == (0, 0, 6)
    assert torch.equal(first, again)
    assert again.dtype == dtype
    assert sizes == [6]


def test_equal_examples_are_asked_once(tmp_path: Path) -> None:
    sizes, oracle = asked()
    x = images(3)[[0, 1, 0, 2, 1, 0]]
    with Metered(oracle, cache=ResponseCache(tmp_path / "cache"), budget=3) as box:
        answer = box.query(x)
        assert torch.equal(answer, Metered(oracle).query(x))
        assert sizes == [3, 6]
        assert (box.statistics.examples, box.statistics.cached) == (3, 3)


def test_only_what_is_new_is_asked(tmp_path: Path) -> None:
    sizes, oracle = asked()
    with Metered(oracle, cache=ResponseCache(tmp_path / "cache"), batch_size=2) as box:
        box.query(images(8)[1::2])
        assert torch.equal(box.query(images(8)), Metered(oracle).query(images(8)))
    assert sizes == [2, 2, 2, 2, 8]


def test_boxes_types_and_shapes_are_kept_apart() -> None:
    x = torch.zeros(2, 4)
    keys = [keys_of("a", x), keys_of("b", x), keys_of("a", x.double()), keys_of("a", x.reshape(2, 2, 2))]
    keys += [keys_of("a", torch.zeros(2, 8)), keys_of("a", -x), keys_of("a", x.to(torch.int32))]
    assert len({key for some in keys for key in some}) == len(keys)
    assert keys_of("a", x[:1]) == keys[0][:1], "an example has its key whatever stands beside it"
    assert keys_of("a", torch.zeros(4, 2).T.contiguous()) == keys[0]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(TYPES))
def test_any_finite_number_comes_back(tmp_path: Path, data: st.DataObject, dtype: torch.dtype) -> None:
    width = 64 if dtype == torch.float64 else 32
    numbers = data.draw(st.lists(st.floats(width=width, allow_nan=False), min_size=2, max_size=5))
    row = torch.tensor(numbers, dtype=dtype)
    cache = ResponseCache(tmp_path / "cache")
    cache.put({b"key": row})
    found = cache.get([b"key", b"none"])
    cache.close()
    assert list(found) == [b"key"]
    assert torch.equal(found[b"key"], row)
    assert torch.equal(found[b"key"].signbit(), row.signbit())


def test_more_keys_than_sqlite_takes_at_once(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "cache")
    rows = {f"{i}".encode(): torch.tensor([float(i), 0.0]) for i in range(1700)}
    cache.put(rows)
    found = cache.get(rows)
    assert all(torch.equal(found[key], row) for key, row in rows.items())
    assert len(found) == len(cache) == 1700
    cache.close()


EMPTY = hashlib.blake2b(digest_size=32).hexdigest()  # the script below has no file
WRITER = """
import sys, numpy as np, torch
from deepzero_core.oracle import FunctionOracle, Metered, ResponseCache, StoredAccount

def paid(x):
    with open(sys.argv[2], "ab", buffering=0) as ledger:  # what the server has sent, before anybody keeps it
        ledger.write(b"%d\\n" * len(x) % tuple(int(row[0]) for row in x))
    return np.stack([x[:, 0] * 3, x.sum(1)], 1)

box = Metered(
    FunctionOracle(paid, version="1", batch_size=8),
    cache=ResponseCache(sys.argv[1]),
    account=StoredAccount(sys.argv[1] + "-account", "run"),
)
i = 0
while True:
    x = torch.arange(i, i + 64.0)[:, None].expand(-1, 16)
    box.query(x)
    print(i, flush=True)
    i += 64
"""


@pytest.mark.parametrize("rounds", [1, 5, 12])
def test_a_killed_process_loses_one_call_at_most(tmp_path: Path, rounds: int) -> None:
    path, ledger = tmp_path / "cache", tmp_path / "ledger"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(ledger)], stdout=subprocess.PIPE, env={**os.environ}
    )
    assert writer.stdout is not None
    for _ in range(rounds):
        assert writer.stdout.readline()
    # It is in the midst of asking and writing: nothing waits for it.
    writer.send_signal(signal.SIGKILL)
    writer.stdout.read()
    writer.stdout.close()
    assert writer.wait(30) == -signal.SIGKILL

    paid = [float(line) for line in ledger.read_bytes().split(b"\n")[:-1]]
    assert len(paid) >= 64 * rounds
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not a word of damage
        cache = ResponseCache(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    kept = len(cache)
    assert len(paid) - 8 <= kept <= len(paid)
    # The rows are right, not only there.
    x = torch.tensor(paid)[:kept, None].expand(-1, 16).contiguous()
    keys = keys_of(f"function:__main__:paid:1:{EMPTY}", x)
    rows = cache.get(keys)
    assert len(rows) == kept
    for i, key in enumerate(keys):
        assert rows[key].tolist() == [paid[i] * 3, paid[i] * 16]
    account = StoredAccount(f"{path}-account", "run")
    assert kept <= account.usage.examples <= kept + 8
    account.close()
    cache.close()


SHARER = """
import sys, torch
from deepzero_core.oracle import ResponseCache, StoredAccount, Usage, QueryBudgetError
cache, account = ResponseCache(sys.argv[1]), StoredAccount(sys.argv[1] + "-account", "run")
for i in range(60):
    name = f"{sys.argv[2]}-{i}".encode()
    cache.put({name: torch.tensor([float(i), 1.0]), b"shared": torch.tensor([7.0, 1.0])})
    assert cache.get([name, b"shared"])[name][0] == i
    try:
        account.add(Usage(examples=1, calls=1), budget=150)
    except QueryBudgetError:
        print("refused")
"""


def test_several_processes_share_a_cache_and_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    command = [sys.executable, "-W", "error", "-c", SHARER, str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, str(i)], **pipes) for i in range(3)]
    outputs = [writer.communicate(timeout=120) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], outputs
    assert sum(output.count("refused") for output, _ in outputs) == 30
    cache, account = ResponseCache(path), StoredAccount(f"{path}-account", "run")
    assert len(cache) == 181
    assert account.usage.examples == account.usage.calls == 150
    cache.close()
    account.close()


def test_threads_share_one(tmp_path: Path) -> None:
    sizes, oracle = asked()
    with Metered(oracle, cache=ResponseCache(tmp_path / "cache"), budget=40) as box, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda seed: box.query(images(10, seed=seed % 4)), range(12)))
        assert (sum(sizes), box.statistics.examples, box.statistics.cached) == (40, 40, 80)
    for seed in range(12):
        assert torch.equal(answers[seed], answers[seed % 4])


def test_a_forked_child_writes_too(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "cache")
    cache.put({b"parent": torch.ones(2)})
    child = os.fork()
    if child == 0:
        # No return into pytest, whatever happens.
        try:
            cache.put({b"child": torch.ones(2)})
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    cache.put({b"later": torch.ones(2)})
    assert len(cache) == 3
    cache.close()


def filled(path: Path) -> Path:
    cache = ResponseCache(path)
    cache.put({f"{i}".encode(): torch.full((10,), float(i)) for i in range(2000)})
    cache.close()
    return path


DAMAGE = {
    "text": lambda data: b"no database " * 1000,
    "head": lambda data: b"\0" * 100 + data[100:],
    "half": lambda data: data[: len(data) // 2],
    "middle": lambda data: data[:4096] + b"\xff" * (len(data) - 4096),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_set_aside(tmp_path: Path, damage: object) -> None:
    path = filled(tmp_path / "cache.sqlite")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"is damaged .* set aside as cache\.sqlite\.damaged-1 and begun anew"):
        cache = ResponseCache(path)
        found = cache.get([f"{i}".encode() for i in range(2000)])
    assert found == {}
    cache.put({b"1": torch.ones(2)})
    assert list(cache.get([b"1"])) == [b"1"]
    cache.close()
    assert (tmp_path / "cache.sqlite.damaged-1").stat().st_size > 0


def test_a_damaged_row_counts_as_not_there(tmp_path: Path) -> None:
    path = filled(tmp_path / "cache")
    connection = sqlite3.connect(path)
    value = connection.execute("SELECT value FROM answers WHERE key = ?", (b"5",)).fetchone()[0]
    for key, damaged in [(b"5", value[:9] + b"\x01" + value[10:]), (b"6", value), (b"7", b""), (b"8", value[:-1])]:
        connection.execute("UPDATE answers SET value = ? WHERE key = ?", (damaged, key))
    connection.commit()
    connection.close()
    cache = ResponseCache(path)
    assert sorted(cache.get([b"4", b"5", b"6", b"7", b"8", b"9"])) == [b"4", b"9"]
    cache.close()


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE runs (x)")
    other.commit()
    other.close()
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(RequestError, match=r"other\.db is a database of something else, not a response cache"):
        ResponseCache(tmp_path / "other.db")
    assert (tmp_path / "other.db").read_bytes() == before
    StoredAccount(tmp_path / "account", "run").close()
    with pytest.raises(RequestError, match="is a database of something else, not a response cache"):
        ResponseCache(tmp_path / "account")
    with pytest.raises(RequestError, match="cannot be opened"):
        ResponseCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be opened"):
        ResponseCache(tmp_path / "file" / "cache")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "cache")
    cache._database.run(lambda connection: connection.execute("PRAGMA max_page_count = 10"))
    with pytest.raises(WorkError, match=r"the response cache .* failed: database or disk is full"):
        cache.put({f"{i}".encode(): torch.zeros(1000) for i in range(100)})
    assert len(cache) == 0
    cache.put({b"one": torch.zeros(2)})
    assert len(cache) == 1
    cache.close()
