"""Checkpoints under attack: cut short, altered, replaced by garbage, killed while being written, on a full disk."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepzero_core.errors import WorkError
from deepzero_core.training import DamagedCheckpointError
from deepzero_core.training.checkpoint import load, load_newest, save, save_step

ROOT = Path(__file__).resolve().parents[2]


def state(step: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "loss": 0.5,
        "module": {"weight": torch.randn(4, 3, generator=generator), "count": torch.tensor(step)},
        "masks": {"weight": torch.randn(4, 3, generator=generator) > 0},
        "optimizer": {"state": {0: {"momentum_buffer": None}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "deep" / "a.ckpt", state())
    assert same(load(tmp_path / "deep" / "a.ckpt"), state())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.ckpt"], "nothing is left beside it"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DamagedCheckpointError, match=rf"{re.escape(str(tmp_path))}/a\.ckpt cannot be read: No such file"
    ):
        load(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"garbage\n", b"\x80\x02}q\x00.", b"deepzero-checkpoint 1 ", bytes(5000)]
)
def test_garbage_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"a\.ckpt is (not a deepzero checkpoint|damaged)"):
        load(tmp_path / "a.ckpt")


def test_a_checkpoint_that_runs_code_is_not_unpickled(tmp_path: Path) -> None:
    """The sum protects from accidents; against an attacker who fits the sum, only plain values are unpickled."""
    import hashlib
    import io

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    buffer = io.BytesIO()
    torch.save({"step": Attack()}, buffer)
    payload = buffer.getvalue()
    header = b"deepzero-checkpoint 1 " + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    (tmp_path / "step-00000002.ckpt").write_bytes(header + payload)
    with pytest.raises(DamagedCheckpointError, match=r"step-00000002\.ckpt"):
        load(tmp_path / "step-00000002.ckpt")
    save_step(tmp_path, 1, state(1))
    assert load_newest(tmp_path).path == tmp_path / "step-00000001.ckpt"
    assert not (tmp_path / "attacked").exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "a.ckpt"
    save(path, state())
    return path


@settings(max_examples=150)
@given(data=st.data())
def test_flipped_bytes_never_load_as_something_else(written: Path, data: st.DataObject) -> None:
    content = bytearray(written.read_bytes())
    places = data.draw(st.sets(st.integers(0, len(content) - 1), min_size=1, max_size=4))
    for place in places:
        content[place] ^= data.draw(st.integers(1, 255))
    damaged = written.with_name("damaged.ckpt")
    damaged.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"damaged\.ckpt"):
        load(damaged)


@given(data=st.data())
def test_a_file_cut_short_or_with_something_behind_it_is_damaged(written: Path, data: st.DataObject) -> None:
    content = written.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    damaged = written.with_name("damaged.ckpt")
    for changed in (content[:cut], content[cut:], content + content[cut:]):
        if changed != content:
            damaged.write_bytes(changed)
            with pytest.raises(DamagedCheckpointError, match=r"damaged\.ckpt"):
                load(damaged)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100, 1000):
        save_step(tmp_path, step, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100.ckpt", "step-00001000.ckpt"]


def test_damaged_ones_are_passed_over_and_named(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step, state(step), keep=4)
    (tmp_path / "step-00000004.ckpt").write_bytes(b"")
    content = bytearray((tmp_path / "step-00000003.ckpt").read_bytes())
    content[-40] ^= 1
    (tmp_path / "step-00000003.ckpt").write_bytes(content)
    (tmp_path / "step-00000005.ckpt").mkdir()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    found = load_newest(tmp_path)
    assert found.path == tmp_path / "step-00000002.ckpt"
    assert same(found.state, state(2))
    assert [re.findall(r"step-\d+", message) for message in found.damaged] == [
        ["step-00000005"],
        ["step-00000004"],
        ["step-00000003"],
    ]


def test_a_folder_without_a_good_checkpoint_has_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nowhere").state is None
    (tmp_path / "step-00000001.ckpt").write_bytes(b"x")
    found = load_newest(tmp_path)
    assert found.state is None and found.path is None and len(found.damaged) == 1


SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from deepzero_core.training.checkpoint import save_step
for step in range(1, 10**6):
    save_step(Path(sys.argv[1]), step, {"step": step, "weight": torch.full((200_000,), float(step))})
    print(step, flush=True)
"""


def test_killed_while_writing_leaves_a_good_one(tmp_path: Path) -> None:
    draw = random.Random(1)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            for _ in range(draw.randint(1, 5)):
                process.stdout.readline()
            time.sleep(draw.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
            reported = [int(line) for line in process.stdout.read().split()]
        found = load_newest(folder)
        assert not found.damaged
        assert found.state is not None
        step = found.state["step"]
        assert torch.equal(found.state["weight"], torch.full((200_000,), float(step)))
        assert step >= max(reported, default=1), "what was reported as saved is there"
        save_step(folder, step + 1, state(step + 1))
        assert not list(folder.glob("*.part")), "what the kill left half-written is cleared away"


FILL_THE_DISK = """
import resource, sys, torch
from pathlib import Path
from deepzero_core.errors import WorkError
from deepzero_core.training.checkpoint import save_step
folder = Path(sys.argv[1])
save_step(folder, 1, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_step(folder, 2, {"step": 2, "weight": torch.zeros(1_000_000)})
except WorkError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_one_and_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert f"checkpoint {tmp_path}/step-00000002.ckpt cannot be written: File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.ckpt"]
    assert load(tmp_path / "step-00000001.ckpt") == {"step": 1}


def test_a_folder_that_cannot_be_made_is_a_failure_of_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match=r"checkpoint .*file/step-00000001\.ckpt cannot be written"):
        save_step(tmp_path / "file", 1, state())
