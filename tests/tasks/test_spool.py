"""Spools under attack: killed while written, cut short, altered, on a full disk, held by another process."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.spool import Spool, SpoolInUseError, place, waiting

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"kind": "run", "run_id": "0" * 32, "began": True}

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
entries = st.lists(st.dictionaries(st.text(max_size=8), plain, max_size=4), max_size=6)


def entries_of(spool: Spool) -> list[Any]:
    return [line.entry for line in spool.read(spool.start)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool")


@given(written=entries)
def test_what_is_appended_is_read_again(folder: Path, written: list[dict[str, Any]]) -> None:
    path = place(folder, "again")
    spool = Spool(path, HEAD)
    spool.clear(HEAD)
    for entry in written:
        spool.append(entry)
    assert entries_of(spool) == written
    assert spool.empty == (not written)
    spool.close()
    assert path.exists() == bool(written)


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_line_is_left_out_and_the_others_are_what_was_written(folder: Path, data: st.DataObject) -> None:
    path = place(folder, "damaged")
    spool = Spool(path, HEAD)
    spool.clear(HEAD)
    written = [{"kind": "metrics", "points": [["train/loss", step / 7, 1, step]]} for step in range(8)]
    for entry in written:
        spool.append(entry)
    content = bytearray(path.read_bytes())
    for at in data.draw(st.sets(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    found = [line.entry for line in spool.read()]
    good = [entry for entry in found if entry is not None]
    everything = [HEAD, *written]
    assert all(entry in everything for entry in good), "nothing is taken for something else"
    assert good == [entry for entry in everything if entry in good], "in order, none twice"
    assert spool.head in (HEAD, {})
    spool.close()


@given(content=st.binary(max_size=300))
def test_any_bytes(folder: Path, content: bytes) -> None:
    path = place(folder, "any")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    spool = Spool(path)
    assert all(entry is None or isinstance(entry, dict) for entry in entries_of(spool))
    spool.append({"kind": "tags"})
    lines = list(spool.read())
    assert not content.endswith(b"\n") or lines[-1].entry == {"kind": "tags"}
    spool.close()


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from tasks.spool import Spool
spool = Spool(Path(sys.argv[1]), {"kind": "run"})
for step in range(10**6):
    spool.append({"step": step})
    if step % 100 == 0:
        print(step, flush=True)
"""


def test_a_killed_process_leaves_all_that_it_had_appended(tmp_path: Path) -> None:
    path = place(tmp_path, "killed")
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        with pytest.raises(SpoolInUseError):
            Spool(path)
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in process.stdout.read().split()]
    spool = Spool(path)
    assert waiting(tmp_path) == [path]
    steps = [entry["step"] for entry in entries_of(spool)]
    assert steps == list(range(len(steps)))
    assert len(steps) > max(reported, default=400)
    spool.close()


FILL_THE_DISK = """
import resource, sys
from pathlib import Path
from deepzero_core.errors import WorkError
from tasks.spool import Spool
spool = Spool(Path(sys.argv[1]), {"kind": "run"})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for step in range(1000):
        spool.append({"step": step})
except WorkError as error:
    print(step, error)
"""


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = place(tmp_path, "full")
    command = [sys.executable, "-c", FILL_THE_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    step, _, sentence = done.stdout.partition(" ")
    assert sentence.strip() == f"what MLflow has yet to be told cannot be kept in {path}: File too large"
    spool = Spool(path)
    assert entries_of(spool) == [{"step": number} for number in range(int(step))]
    spool.append({"step": "after"})
    assert entries_of(spool)[-1] == {"step": "after"}
    spool.close()


def test_a_spool_that_was_delivered_in_the_meantime_is_nobodys(tmp_path: Path) -> None:
    with pytest.raises(SpoolInUseError):
        Spool(place(tmp_path, "gone"))
    assert waiting(tmp_path) == []
    assert not list((tmp_path / "spool").iterdir())


def test_artifacts_wait_beside_the_lines(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "a.txt").write_text("a")
    (tmp_path / "b.bin").write_bytes(b"b")
    spool = Spool(place(tmp_path, "files"), HEAD)
    first, second = spool.keep(tmp_path / "report"), spool.keep(tmp_path / "b.bin")
    assert (first / "a.txt").read_text() == "a" and second.read_bytes() == b"b"
    assert first.is_relative_to(spool.files) and first.parent != second.parent
    spool.clear(HEAD)
    assert not spool.files.exists()
    spool.close()
    assert not list(spool.path.parent.iterdir())


def test_lines_can_be_read_by_others(tmp_path: Path) -> None:
    """The format is a promise: CRC-32, a space, JSON."""
    import zlib

    spool = Spool(place(tmp_path, "format"), HEAD)
    spool.append({"kind": "tags", "values": {"a": "1"}})
    for line in spool.path.read_bytes().splitlines():
        check, _, text = line.partition(b" ")
        assert int(check, 16) == zlib.crc32(text)
        assert json.loads(text)["kind"] in ("run", "tags")
    spool.close()
