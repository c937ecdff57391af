"""Files that a disk or a hand has changed at random bytes: refused or mended with a sentence, never silently wrong.

Checkpoints and spools have tests of their own (tests/training/test_checkpoint.py, tests/tasks/test_spool.py), and so
have manifests (tests/data/test_manifest.py); here is what lies around them, and what someone makes on purpose.
"""

import hashlib
import io
import logging
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepzero_core.data import prepare, verify
from deepzero_core.errors import DeepZeroError, RequestError
from deepzero_core.models import build_model
from deepzero_core.oracle.cache import ResponseCache, keys_of
from deepzero_core.training import FirstOrderSource, Schedule, Trainer, TrainingSettings
from deepzero_core.training.checkpoint import load_newest
from tasks.history import History, intact, read

PLACES = 300
"""Random positions per kind of file."""


def damage(content: bytes, draw: random.Random) -> bytes:
    """One to four bytes changed, or a piece lost at the end or in the middle, or doubled."""
    changed = bytearray(content)
    kind = draw.choice(["flip", "flip", "flip", "flip", "cut", "hole", "double"])
    at = draw.randrange(len(changed))
    if kind == "flip":
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] ^= draw.randint(1, 255)
    elif kind == "cut":
        del changed[at:]
    elif kind == "hole":
        del changed[at : at + draw.randint(1, 512)]
    else:
        changed[at:at] = changed[at : at + draw.randint(1, 512)]
    return bytes(changed)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("digits", home=tmp_path_factory.mktemp("damage")).path


@pytest.mark.parametrize("file", ["manifest.json", "train.arrow", "test.arrow"])
def test_a_damaged_store_is_refused_with_what_mends_it(store: Path, tmp_path: Path, file: str) -> None:
    """As the stage `prepare` looks at it at the beginning of every run."""
    draw, copy = random.Random(file), tmp_path / "digits"
    shutil.copytree(store, copy)
    content, whole = (copy / file).read_bytes(), verify(store)
    for _ in range(PLACES // 3):
        damaged = damage(content, draw)
        (copy / file).write_bytes(damaged)
        if damaged == content:
            continue
        try:
            found = verify(copy)
        except RequestError as error:
            assert "deepzero data prepare digits --force" in str(error)
        else:
            assert file == "manifest.json" and found == whole, "white space may change, and nothing else"
    (copy / file).write_bytes(content)
    assert verify(copy).name == "digits"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A history of 30 steps and the mark that a checkpoint keeps of it."""
    path = tmp_path_factory.mktemp("history") / "history.jsonl"
    with History(path, last_step=0) as written:
        for step in range(1, 31):
            written.append({"kind": "step", "step": step, "loss": 1 / step})
        written.flush()
        mark = written.mark
    return path, mark


def test_a_changed_history_is_noticed(history: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, mark = history
    content, copy, draw = path.read_bytes(), tmp_path / "history.jsonl", random.Random("history")
    assert intact(path, mark)
    for _ in range(PLACES):
        damaged = damage(content, draw)
        copy.write_bytes(damaged)
        assert intact(copy, mark) == damaged.startswith(content)
    copy.write_bytes(content + b'{"kind": "step", "step": 31, "lo')
    assert intact(copy, mark), "what was written after the checkpoint is not its own"
    with History(copy, last_step=30) as again:
        assert again.mark == mark
        assert [line["step"] for line in again.kept] == list(range(1, 31))
    assert not intact(tmp_path / "gone.jsonl", mark)


@given(mark=st.none() | st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=70)) | st.integers())
def test_a_mark_of_any_content(history: tuple[Path, dict[str, Any]], mark: Any) -> None:
    assert not intact(history[0], mark) or mark == {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_a_history_of_any_content(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    for line in read(path):
        assert isinstance(line["step"], int)


def test_a_damaged_cache_of_answers_is_asked_again_and_never_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is SQLite's, whose pages may be damaged as well as our rows: an answer is the one that was paid for, or
    it is not there."""
    caplog.set_level(logging.CRITICAL)
    questions = torch.rand(40, 1, 4, 4)
    rows = dict(zip(keys_of("box", questions), torch.rand(40, 3), strict=True))
    cache = ResponseCache(tmp_path / "answers.sqlite")
    cache.put(rows)
    cache.close()
    content, draw = (tmp_path / "answers.sqlite").read_bytes(), random.Random("cache")
    for number in range(PLACES // 3):
        place = tmp_path / f"answers{number}.sqlite"
        place.write_bytes(damage(content, draw))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a cache was begun anew is told as a warning
                damaged = ResponseCache(place)
                found = damaged.get(list(rows))
                damaged.put(rows)
                assert all(torch.equal(row, rows[key]) for key, row in damaged.get(list(rows)).items())
                damaged.close()
        except DeepZeroError as error:
            assert str(place) in str(error) and "\n" not in str(error)
        else:
            assert all(torch.equal(row, rows[key]) for key, row in found.items())


# Files that somebody has made on purpose: the sums fit.


def trainer() -> Trainer:
    class Batches:
        steps_per_epoch = 2

        def batch(self, epoch: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(2, 1, 8, 8), torch.tensor([0, 1])

    module = build_model("cnn", in_channels=1, num_classes=2, image_size=8, depth=1, width=2, seed=0)
    source = FirstOrderSource(torch.nn.functional.cross_entropy)
    return Trainer(module, Batches(), source, TrainingSettings(4, Schedule(0.1, 4, 0, "constant"), 0))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(torch.ones(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(data=st.data())
def test_a_state_of_any_content_is_restored_or_refused(data: st.DataObject) -> None:
    """A good state with entries replaced, left out or added, at any depth."""
    state = trainer().state()
    place: Any = state
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [key for key, value in place.items() if isinstance(value, dict) and value]
        if not inner:
            break
        place = place[data.draw(st.sampled_from(inner))]
    key = data.draw(st.sampled_from(list(place)) if place else st.text(max_size=5))
    if data.draw(st.booleans()):
        place.pop(key, None)
    else:
        place[key] = data.draw(plain)
    fresh = trainer()
    try:
        fresh.restore(state)
    except RequestError as error:
        assert "\n" not in str(error) and "checkpoint" in str(error)
    else:
        assert fresh.step >= 0


@settings(max_examples=150)
@given(payload=st.binary(max_size=300) | plain.map(lambda value: _saved(value)), data=st.data())
def test_a_checkpoint_of_any_content_with_a_right_sum(
    tmp_path_factory: pytest.TempPathFactory, payload: bytes, data: st.DataObject
) -> None:
    if data.draw(st.booleans()) and payload:
        changed = bytearray(payload)
        changed[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
        payload = bytes(changed)
    folder = tmp_path_factory.getbasetemp() / "signed"
    folder.mkdir(exist_ok=True)
    header = b"deepzero-checkpoint 1 " + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    (folder / "step-00000001.ckpt").write_bytes(header + payload)
    found = load_newest(folder)
    assert found.state is None or isinstance(found.state, dict)
    assert (found.state is None) == bool(found.damaged)
    assert all("\n" not in sentence for sentence in found.damaged)


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
