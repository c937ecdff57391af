"""The image store: bits in, bits out, without a copy; nothing half-written; damage has a name."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepzero_core.data import ImageStore, verify, write_store
from deepzero_core.data.files import write_arrow
from deepzero_core.data.manifest import MANIFEST_FILE
from deepzero_core.data.store import channel_statistics, publish
from deepzero_core.errors import RequestError, WorkError

DESCRIPTION = {"name": "toy", "source": "random", "licence": "MIT", "class_names": ("a", "b", "c")}


def arrays(seed=0, train=20, test=6, shape=(3, 5, 4)):
    rng = np.random.default_rng(seed)
    return {
        split: (rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, 3, count))
        for split, count in (("train", train), ("test", test))
    }


def contents(folder):
    """Name, inode and time of each file: unchanged only where nothing was written."""
    return sorted((path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "toy", arrays(), **DESCRIPTION)
    return tmp_path / "toy"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 5, 4), (4, 2, 3)])
def test_round_trip(tmp_path, shape):
    data = arrays(shape=shape)
    manifest = write_store(tmp_path / "toy", data, **DESCRIPTION)
    opened = ImageStore.open(tmp_path / "toy", verify=True)
    assert opened.manifest == manifest
    assert manifest.counts == {"train": 20, "test": 6}
    assert manifest.image_shape == shape
    for name, (images, labels) in data.items():
        split = opened.split(name)
        assert len(split) == len(labels)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)


def test_views_are_zero_copy_and_read_only(store):
    before = pa.total_allocated_bytes()
    opened = ImageStore.open(store)
    split = opened.split("train")
    assert pa.total_allocated_bytes() == before
    assert not split.images.flags.owndata
    assert split.images.flags.c_contiguous
    for array in (split.images, split.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_non_contiguous_images_and_small_label_types(tmp_path):
    data = arrays()
    turned = {
        k: (images.transpose(0, 1, 3, 2)[:, ::-1], labels.astype(np.uint8)) for k, (images, labels) in data.items()
    }
    write_store(tmp_path / "toy", turned, **DESCRIPTION)
    split = ImageStore.open(tmp_path / "toy").split("train")
    np.testing.assert_array_equal(split.images, turned["train"][0])
    assert split.labels.dtype == np.int64


def test_statistics_agree_with_numpy(tmp_path):
    data = arrays(train=1500)
    manifest = write_store(tmp_path / "toy", data, **DESCRIPTION)
    scaled = data["train"][0].astype(np.float64) / 255
    np.testing.assert_allclose(manifest.mean, scaled.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, scaled.std(axis=(0, 2, 3)), rtol=1e-12)


def test_given_statistics_are_kept(tmp_path):
    manifest = write_store(
        tmp_path / "toy", arrays(), **DESCRIPTION, mean=(0.5, 0.5, 0.5), std=np.array([0.1, 0.2, 0.3])
    )
    assert (manifest.mean, manifest.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))


def test_constant_channel_has_unit_deviation():
    images = np.full((4, 2, 3, 3), 51, dtype=np.uint8)
    images[0, 1] = 0
    mean, std = channel_statistics(images)
    assert (mean[0], std[0]) == (0.2, 1.0)
    assert std[1] < 1


def test_second_write_of_the_same_data_does_nothing(store):
    before = contents(store)
    manifest, written = publish(store, arrays(), **DESCRIPTION)
    assert not written
    assert contents(store) == before
    assert manifest.digest == ImageStore.open(store).manifest.digest


def test_other_data_replace_the_store_while_readers_keep_theirs(store):
    old = ImageStore.open(store).split("train")
    _, written = publish(store, arrays(seed=1), **DESCRIPTION)
    assert written
    np.testing.assert_array_equal(old.images, arrays()["train"][0])
    np.testing.assert_array_equal(ImageStore.open(store).split("train").images, arrays(seed=1)["train"][0])
    assert [path.name for path in store.parent.iterdir()] == ["toy"]


def test_failed_write_leaves_no_trace_and_the_old_store(store, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    before = contents(store)
    monkeypatch.setattr("deepzero_core.data.files.write_bytes", full)
    with pytest.raises(WorkError, match=r"writing data store .*toy failed: .*No space left"):
        write_store(store, arrays(seed=1), **DESCRIPTION)
    assert contents(store) == before
    assert [path.name for path in store.parent.iterdir()] == ["toy"]


def test_what_a_killed_writer_left_is_swept_after_a_day(tmp_path):
    abandoned, active = tmp_path / ".toy.0123.tmp", tmp_path / ".toy.4567.tmp"
    for folder in (abandoned, active):
        folder.mkdir()
    yesterday = time.time() - 90_000
    os.utime(abandoned, (yesterday, yesterday))
    write_store(tmp_path / "toy", arrays(), **DESCRIPTION)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".toy.4567.tmp", "toy"]


def test_a_linked_store_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "toy").symlink_to(tmp_path / "disk", target_is_directory=True)
    write_store(tmp_path / "toy", arrays(), **DESCRIPTION)
    write_store(tmp_path / "toy", arrays(seed=1), **DESCRIPTION)
    assert (tmp_path / "toy").is_symlink()
    np.testing.assert_array_equal(ImageStore.open(tmp_path / "toy").split("test").labels, arrays(seed=1)["test"][1])


def test_a_folder_that_is_no_store_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(RequestError, match=r"thesis is not a data store, it holds 'chapter1\.tex'"):
        write_store(tmp_path / "thesis", arrays(), **DESCRIPTION)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="file is in the way of a data store"):
        write_store(tmp_path / "file", arrays(), **DESCRIPTION)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_place_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        write_store(tmp_path / "file" / "toy", arrays(), **DESCRIPTION)


# Run as a script, as two users of one machine would; waits for the file `go`, so that both start at once.
WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from deepzero_core.data.store import publish

folder, go, seeds = Path(sys.argv[1]), Path(sys.argv[2]), [int(seed) for seed in sys.argv[3:]]
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
for seed in seeds:
    images = np.random.default_rng(seed).integers(0, 256, (200, 3, 8, 8), dtype=np.uint8)
    splits = dict.fromkeys(("train", "test"), (images, np.arange(200) % 3))
    written = publish(folder, splits, name="toy", source="random", licence="MIT", class_names="abc")[1]
print(written)
"""


def write_at_once(tmp_path, *seeds):
    """Let one process for each list of seeds write these stores to one place; returns their last answers."""
    folder, go = tmp_path / "stores" / "toy", tmp_path / "go"
    writers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, folder, go, *map(str, each)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in seeds
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n", writer.communicate()[1]
    go.touch()
    answers = []
    for writer in writers:
        output, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
        answers.append(output.strip())
    verify(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["toy"], "nothing temporary is left"
    return answers


def test_two_processes_write_the_same_store(tmp_path):
    assert "True" in write_at_once(tmp_path, [0], [0])


def test_two_processes_keep_replacing_each_others_store(tmp_path):
    write_at_once(tmp_path, [1, 2] * 20, [3, 4] * 20)


def flip_a_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_changed_byte_is_found_by_verify(store):
    flip_a_bit(store / "train.arrow", 700)
    ImageStore.open(store)
    pattern = (
        r"data set 'toy' is damaged: .*train\.arrow has sha256 [0-9a-f]{64}, its manifest says [0-9a-f]{64}; "
        r"prepare it again with `deepzero data prepare toy --force`"
    )
    with pytest.raises(RequestError, match=pattern):
        verify(store)
    with pytest.raises(RequestError, match=pattern):
        ImageStore.open(store, verify=True)


def test_damage_is_mended_by_writing_again(store):
    flip_a_bit(store / "test.arrow", 700)
    _, written = publish(store, arrays(), **DESCRIPTION)
    assert written
    verify(store)


@pytest.mark.parametrize("file", ["train.arrow", "test.arrow"])
def test_truncation_is_noticed_at_open(store, file):
    os.truncate(store / file, 100)
    with pytest.raises(RequestError, match=rf"{file} has 100 bytes, its manifest says \d+; prepare it again"):
        ImageStore.open(store)


def test_missing_file_is_noticed_at_open(store):
    (store / "test.arrow").unlink()
    with pytest.raises(RequestError, match=r"test\.arrow cannot be found"):
        ImageStore.open(store)


def test_missing_manifest(store):
    (store / MANIFEST_FILE).unlink()
    with pytest.raises(RequestError, match=r"is damaged: manifest\.json cannot be read .* data prepare toy --force"):
        ImageStore.open(store)
    assert publish(store, arrays(), **DESCRIPTION)[1]


def test_truncated_manifest(store):
    os.truncate(store / MANIFEST_FILE, 100)
    with pytest.raises(RequestError, match=r"manifest\.json cannot be used: it is not JSON .* prepare toy --force"):
        ImageStore.open(store)


def test_store_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match=r"nowhere does not exist; `deepzero data prepare NAME` makes one"):
        ImageStore.open(tmp_path / "nowhere")


@given(st.data())
def test_damage_inside_a_file_is_refused_or_readable(tmp_path_factory, data):
    """Size unchanged and not verified: Arrow's own metadata may be wrong, and reading must still be safe."""
    store = tmp_path_factory.mktemp("damaged") / "toy"
    write_store(store, arrays(train=4, test=2), **DESCRIPTION)
    content = bytearray((store / "train.arrow").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (store / "train.arrow").write_bytes(content)
    try:
        split = ImageStore.open(store).split("train")
    except RequestError as error:
        assert "train.arrow" in str(error)
        assert "\n" not in str(error)
        return
    assert split.images.shape == (4, 3, 5, 4)
    assert split.images.sum() >= 0
    assert 0 <= split.labels.min() <= split.labels.max() <= 2


def test_names_inside_a_file_that_are_not_text(store):
    """pyarrow answers this damage with a UnicodeDecodeError."""
    content = (store / "train.arrow").read_bytes()
    (store / "train.arrow").write_bytes(content.replace(b"image\0", b"\xf0mage\0"))
    with pytest.raises(RequestError, match=r"train\.arrow is not a readable Arrow file"):
        ImageStore.open(store)


LAYOUTS = {
    "other-columns": pa.record_batch({"pixels": pa.array([1] * 20)}),
    "not-fixed-size": pa.record_batch({"image": pa.array([[1]] * 20), "label": pa.array([0] * 20)}),
    "wrong-width": pa.record_batch(
        {"image": pa.array([[1]] * 20, pa.list_(pa.uint8(), 1)), "label": pa.array([0] * 20)}
    ),
    "wrong-count": pa.record_batch(
        {"image": pa.array([[1] * 60] * 19, pa.list_(pa.uint8(), 60)), "label": pa.array([0] * 19)}
    ),
    "nulls": pa.record_batch({"image": pa.array([None] * 20, pa.list_(pa.uint8(), 60)), "label": pa.array([0] * 20)}),
    "labels": pa.record_batch(
        {"image": pa.array([[1] * 60] * 20, pa.list_(pa.uint8(), 60)), "label": pa.array([3] * 20)}
    ),
}


@pytest.mark.parametrize("batch", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_file_of_another_layout(store, batch):
    """Only reachable with a manifest made for it; the reader must not trust even that."""
    manifest = ImageStore.open(store).manifest
    write_arrow(store / "train.arrow", batch)
    sizes = {**manifest.sizes, "train.arrow": (store / "train.arrow").stat().st_size}
    (store / MANIFEST_FILE).write_text(replace(manifest, sizes=sizes).to_json())
    with pytest.raises(RequestError, match=r"data set 'toy' is damaged: .*train\.arrow (does not|holds labels)"):
        ImageStore.open(store)


def test_unknown_split(store):
    with pytest.raises(RequestError, match=r"data set 'toy' has no split 'tset': did you mean 'test'\?"):
        ImageStore.open(store).split("tset")


def test_pickles_are_small_and_map_again(store):
    opened = ImageStore.open(store)
    for value in (opened, opened.split("train")):
        assert len(pickle.dumps(value)) < 600
    split = pickle.loads(pickle.dumps(opened.split("train")))
    np.testing.assert_array_equal(split.images, arrays()["train"][0])
    assert pickle.loads(pickle.dumps(opened)).manifest == opened.manifest


def test_pickled_split_of_a_replaced_store(store):
    pickled = pickle.dumps(ImageStore.open(store).split("train"))
    write_store(store, arrays(seed=1), **DESCRIPTION)
    with pytest.raises(RequestError, match="was replaced by another one"):
        pickle.loads(pickled)


def test_moved_store_opens(store, tmp_path):
    shutil.move(store, tmp_path / "elsewhere")
    verify(tmp_path / "elsewhere")


def images(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype=dtype)


GOOD = images(2, 3, 4, 4), np.array([0, 1])
WRONG = {
    "float-images": (
        (images(2, 3, 4, 4, dtype=np.float32), GOOD[1]),
        r"uint8 .* got float32 \[2, 3, 4, 4\]",
    ),
    "three-axes": ((images(2, 4, 4), GOOD[1]), r"got uint8 \[2, 4, 4\]"),
    "empty": ((images(0, 3, 4, 4), np.zeros(0, dtype=np.int64)), "not empty"),
    "float-labels": ((GOOD[0], np.array([0.0, 1.0])), r"integers \[2\].* got float64 \[2\]"),
    "label-count": ((GOOD[0], np.array([0, 1, 1])), r"integers \[2\].* got int64 \[3\]"),
    "label-large": ((GOOD[0], np.array([0, 3])), r"label 3 of example 1 in the train split .* labels 0 to 2"),
    "label-negative": ((GOOD[0], np.array([-1, 0])), r"label -1 of example 0"),
    "shape-differs": (
        (images(2, 3, 5, 5), GOOD[1]),
        r"mixes image shapes: train has \[3, 5, 5\], test",
    ),
}


@pytest.mark.parametrize(("train", "message"), WRONG.values(), ids=WRONG.keys())
def test_unusable_arrays(tmp_path, train, message):
    with pytest.raises(RequestError, match=message):
        write_store(tmp_path / "toy", {"train": train, "test": GOOD}, **DESCRIPTION)
    assert list(tmp_path.iterdir()) == []


def test_missing_split_and_bad_description(tmp_path):
    with pytest.raises(RequestError, match="needs the splits train and test, got train"):
        write_store(tmp_path / "toy", {"train": GOOD}, **DESCRIPTION)
    data = {"train": GOOD, "test": GOOD}
    with pytest.raises(RequestError, match="'class_names' holds a name twice"):
        write_store(tmp_path / "toy", data, **{**DESCRIPTION, "class_names": ("a", "a")})
    with pytest.raises(RequestError, match="no class names"):
        write_store(tmp_path / "toy", data, **{**DESCRIPTION, "class_names": ()})
    with pytest.raises(RequestError, match="one number for each of the 3 channels"):
        write_store(tmp_path / "toy", data, **DESCRIPTION, mean=(0.5,), std=(0.5,))
    assert list(tmp_path.iterdir()) == []
