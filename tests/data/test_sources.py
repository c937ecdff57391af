"""Sources whose data a test can make: digits, archives and folders, and what `prepare` does with them."""

import json
import pickle
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from deepzero_core.data import ImageStore, SourceInfo, available, prepare, prepared_stores, verify
from deepzero_core.data.sources.splitting import stratified_split
from deepzero_core.errors import RequestError

NAMES = ["digits", "image_folder", "npz", "cifar10", "cifar100", "mnist", "fashion_mnist", "svhn", "stl10"]


def test_available_describes_every_source():
    assert [info.name for info in available()] == NAMES
    for info in available():
        assert isinstance(info, SourceInfo)
        assert info.description
        assert info.licence
        assert (info.needs == "") == (info.name == "digits")


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    prepared = prepare("digits", home=tmp_path)
    assert prepared.written
    assert prepared.path == tmp_path / "data" / "digits"
    store = ImageStore.open(prepared, verify=True)
    train, test = store.split("train"), store.split("test")
    assert (train.images.shape, test.images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))

    digits = load_digits()
    wanted = sorted(
        (np.array([round(v * 255 / 16) for v in image.ravel()], dtype=np.uint8).tobytes(), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    stored = sorted(
        (image.tobytes(), int(label))
        for split in (train, test)
        for image, label in zip(split.images, split.labels, strict=True)
    )
    assert stored == wanted
    share = np.bincount(test.labels) / np.bincount(digits.target)
    assert (abs(share - 0.2) < 0.006).all()


def test_second_prepare_does_nothing_and_says_so(tmp_path):
    first = prepare("digits", home=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    for force in (False, True):
        second = prepare("digits", home=tmp_path, force=force)
        assert not second.written
        assert second.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["digits"]


def test_damaged_store_is_named_and_mended_by_force(tmp_path):
    path = prepare("digits", home=tmp_path).path
    (path / "train.arrow").write_bytes(b"not what it was")
    with pytest.raises(RequestError, match=r"'digits' is damaged: .*train\.arrow .*prepare digits --force`"):
        prepare("digits", home=tmp_path)
    assert prepare("digits", home=tmp_path, force=True).written
    verify(path)


def test_store_of_another_schema_version(tmp_path):
    path = prepare("digits", home=tmp_path).path
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(RequestError, match=r"schema version 99, .* reads version 1; .*prepare digits --force`"):
        prepare("digits", home=tmp_path)
    assert prepare("digits", home=tmp_path, force=True).written


def test_prepared_stores(tmp_path):
    with pytest.raises(RequestError, match=r"'digits' has no store in .*; `deepzero data prepare digits` makes one"):
        prepared_stores("digits", home=tmp_path)
    path = prepare("digits", home=tmp_path).path
    assert prepared_stores("digits", home=tmp_path) == [path]


REFUSED = {
    "unknown": ("cifr10", {}, r"unknown data set 'cifr10', did you mean 'cifar10'\?"),
    "built-in": ("digits", {"source": "x"}, "'digits' needs no source"),
    "no-source": ("npz", {}, r"'npz' needs a source that is not given: the \.npz file"),
    "no-download": ("digits", {"download": True}, "'digits' cannot be downloaded"),
    "no-size": ("mnist", {"image_size": 32}, "images of data set 'mnist' have one size"),
    "size": ("image_folder", {"source": "x", "image_size": 0}, "at least 1 pixel, got 0"),
    "no-file": ("npz", {"source": "nowhere.npz"}, r"nowhere\.npz is not a file"),
    "no-folder": ("image_folder", {"source": "nowhere"}, "there is no folder train"),
}


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_impossible_requests(tmp_path, name, arguments, message):
    with pytest.raises(RequestError, match=message):
        prepare(name, home=tmp_path / "home", **arguments)
    assert not (tmp_path / "home").exists()


def test_home_that_cannot_be_written(tmp_path):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(RequestError, match="cannot be written"):
        prepare("digits", home=tmp_path / "home")


# --- npz ---

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 3, 6, 5), dtype=np.uint8)
LABELS = np.arange(20) % 4


def archive(tmp_path, **arrays):
    np.savez(tmp_path / "own.npz", **arrays)
    return tmp_path / "own.npz"


def test_npz_with_a_test_split(tmp_path):
    names = np.array(["ant", "bee", "cat", "dog"])
    path = archive(
        tmp_path, images=IMAGES, labels=LABELS, test_images=IMAGES[:5], test_labels=LABELS[:5], class_names=names
    )
    prepared = prepare("npz", home=tmp_path, source=path)
    store = ImageStore.open(prepared, verify=True)
    np.testing.assert_array_equal(store.split("train").images, IMAGES)
    np.testing.assert_array_equal(store.split("train").labels, LABELS)
    np.testing.assert_array_equal(store.split("test").images, IMAGES[:5])
    assert store.manifest.class_names == ("ant", "bee", "cat", "dog")
    assert str(tmp_path) not in store.manifest.to_json(), "the digest must be the same on every machine"


def test_npz_without_a_test_split(tmp_path):
    path = archive(tmp_path, images=IMAGES[:, 0], labels=LABELS.astype(np.uint8))
    store = ImageStore.open(prepare("npz", home=tmp_path, source=path))
    assert store.manifest.image_shape == (1, 6, 5)
    assert store.manifest.counts == {"train": 16, "test": 4}
    assert store.manifest.class_names == ("0", "1", "2", "3")
    assert sorted(store.split("test").labels.tolist()) == [0, 1, 2, 3]


def test_npz_stores_are_told_apart_by_content(tmp_path):
    path = archive(tmp_path, images=IMAGES, labels=LABELS)
    first = prepare("npz", home=tmp_path, source=path)
    assert not prepare("npz", home=tmp_path, source=path).written
    archive(tmp_path, images=IMAGES, labels=LABELS[::-1])
    second = prepare("npz", home=tmp_path, source=path)
    assert second.written
    assert second.path != first.path
    assert prepared_stores("npz", home=tmp_path) == sorted([first.path, second.path])


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_npz_with_objects_is_never_unpickled(tmp_path):
    sprung = tmp_path / "sprung"
    path = archive(tmp_path, images=np.array([Trap(sprung)], dtype=object), labels=LABELS)
    assert not sprung.exists()
    with pytest.raises(RequestError, match=r"array 'images' of .*own\.npz cannot be read \(it holds Python objects\)"):
        prepare("npz", home=tmp_path, source=path)
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(RequestError, match=r"own\.npz is not a readable \.npz archive"):
        prepare("npz", home=tmp_path, source=path)
    assert not sprung.exists()


BAD_ARRAYS = {
    "no-labels": ({"images": IMAGES}, r"has no array 'labels'; it holds images"),
    "misspelt": ({"images": IMAGES, "lables": LABELS}, r"array 'lables' .*did you mean 'labels'\?"),
    "half-test": ({"images": IMAGES, "labels": LABELS, "test_images": IMAGES}, "only one of 'test_images' and"),
    "floats": ({"images": IMAGES / 255, "labels": LABELS}, "'images' of .* is float64, images have to be uint8"),
    "two-axes": ({"images": IMAGES[0, 0], "labels": LABELS}, r"shape \[6, 5\], images have to be \[N, H, W\] or"),
    "channels-last": (
        {"images": IMAGES.transpose(0, 2, 3, 1), "labels": LABELS},
        r"looks like \[N, H, W, C\]; store images\.transpose\(0, 3, 1, 2\)",
    ),
    "empty": ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"shape \[0, 3, 6, 5\]"),
    "one-hot": (
        {"images": IMAGES, "labels": np.eye(20, dtype=int)},
        r"is int64 \[20, 20\], labels have to be",
    ),
    "float-labels": ({"images": IMAGES, "labels": LABELS / 1}, r"is float64 \[20\], labels have to be integers"),
    "too-few": ({"images": IMAGES, "labels": LABELS[:19]}, r"is int64 \[19\], labels have to be integers \[20\]"),
    "negative": ({"images": IMAGES, "labels": LABELS - 1}, "holds the label -1, labels are 0, 1, 2"),
    "gaps": ({"images": IMAGES, "labels": LABELS + 10**9}, "label 1000000003 among 20 examples"),
    "beyond-int64": ({"images": IMAGES, "labels": LABELS.astype(np.uint64) + 2**63}, "the label 9223372036854775"),
    "beyond-names": (
        {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b", "c"])},
        "label 3 of example .* 3 classes have the labels 0 to 2",
    ),
    "numeric-names": (
        {"images": IMAGES, "labels": LABELS, "class_names": np.arange(4)},
        r"'class_names' of .* is int64 \[4\], it has to be strings",
    ),
    "mixed-sizes": (
        {"images": IMAGES, "labels": LABELS, "test_images": IMAGES[..., 1:], "test_labels": LABELS},
        r"mixes image shapes: train has \[3, 6, 5\], test has \[3, 6, 4\]",
    ),
    "singletons": ({"images": IMAGES[:4], "labels": LABELS[:4]}, "too few examples to set some aside"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_unusable_archives(tmp_path, arrays, message):
    path = archive(tmp_path, **arrays)
    with pytest.raises(RequestError, match=message):
        prepare("npz", home=tmp_path / "home", source=path)
    assert not list((tmp_path / "home").rglob("*.arrow"))


def test_files_that_are_no_archives(tmp_path):
    path = tmp_path / "own.npz"
    for content in (b"", b"hello", b"PK\x03\x04" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(RequestError, match=r"own\.npz is not a readable \.npz archive"):
            prepare("npz", home=tmp_path, source=path)
    with path.open("wb") as stream:
        np.save(stream, IMAGES)
    with pytest.raises(RequestError, match="is a single array"):
        prepare("npz", home=tmp_path, source=path)


def test_members_that_are_no_arrays(tmp_path):
    header = b"\x93NUMPY\x01\x00"
    shape = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }\n"
    huge = shape % 10**18
    members = {"text": b"hello", "no header": header, "huge": header + struct.pack("<H", len(huge)) + huge}
    path = tmp_path / "own.npz"
    for content in members.values():
        with zipfile.ZipFile(path, "w") as archived:
            archived.writestr("images.npy", content)
            archived.writestr("labels.npy", content)
        with pytest.raises(RequestError, match=r"'images' of .*own\.npz (is not an array|cannot be read)"):
            prepare("npz", home=tmp_path, source=path)


def test_damaged_member_of_an_archive(tmp_path):
    path = archive(tmp_path, images=IMAGES, labels=LABELS)
    data = bytearray(path.read_bytes())
    data[300:400] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"array 'images' of .* cannot be read \(.*CRC"):
        prepare("npz", home=tmp_path, source=path)


# --- stratified split ---


def test_stratified_split_is_a_partition_in_proportion():
    labels = np.random.default_rng(0).choice(4, 1001, p=(0.7, 0.2, 0.09, 0.01))
    train, test = stratified_split(labels, name="toy")
    assert len(test) == 201
    assert sorted([*train, *test]) == list(range(1001))
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    assert (abs(np.bincount(labels[test], minlength=4) - 0.2 * np.bincount(labels)) <= 1).all()
    again = stratified_split(labels, name="toy")
    np.testing.assert_array_equal(again[1], test)


def test_stratified_split_keeps_each_class_in_training():
    labels = np.array([0, 1, 1, 2, 3, 4])
    train, test = stratified_split(labels, name="toy")
    assert set(labels[train]) == {0, 1, 2, 3, 4}
    assert labels[test].tolist() == [1]


# --- image_folder ---


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "own"
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                pixels = IMAGES[10 * label + number].transpose(1, 2, 0)
                save(root / split / name / f"{number}.png", np.ascontiguousarray(pixels))
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    (root / "train" / "ant" / ".hidden.png").write_text("not an image")
    return root


@pytest.mark.parametrize("test_folder", ["val", "test"])
def test_folder_is_read_exactly_and_in_order(tmp_path, folder, test_folder):
    if test_folder != "val":
        (folder / "val").rename(folder / test_folder)
    prepared = prepare("image_folder", home=tmp_path, source=folder)
    store = ImageStore.open(prepared, verify=True)
    assert store.manifest.class_names == ("ant", "bee")
    np.testing.assert_array_equal(store.split("train").images, IMAGES[[0, 1, 2, 10, 11, 12]])
    np.testing.assert_array_equal(store.split("test").images, IMAGES[[0, 1, 10, 11]])
    assert store.split("train").labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert store.split("test").labels.tolist() == [0, 0, 1, 1]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [prepared.path.name]


def test_folder_is_resized_and_has_a_store_for_each_size_and_content(tmp_path, folder):
    plain = prepare("image_folder", home=tmp_path, source=folder)
    resized = prepare("image_folder", home=tmp_path, source=folder, image_size=4)
    assert resized.manifest.image_shape == (3, 4, 4)
    assert not prepare("image_folder", home=tmp_path, source=folder, image_size=4).written
    save(folder / "train" / "ant" / "0.png", np.zeros((6, 5, 3), dtype=np.uint8))
    changed = prepare("image_folder", home=tmp_path, source=folder)
    assert len({plain.path, resized.path, changed.path}) == 3


def test_resizing_keeps_the_proportions(tmp_path, folder):
    """A wide picture, black - white - black: only the white middle is left."""
    shutil.rmtree(folder)
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 255
    for split in ("train", "test"):
        save(folder / split / "ant" / "0.png", wide)
    store = ImageStore.open(prepare("image_folder", home=tmp_path, source=folder, image_size=10))
    assert (store.split("train").images == 255).all()


def test_mixed_sizes_need_an_image_size(tmp_path, folder):
    save(folder / "val" / "bee" / "9.png", np.zeros((6, 7, 3), dtype=np.uint8))
    with pytest.raises(RequestError, match=r"9\.png is 7x6 pixels and .*0\.png is 5x6; set an image size"):
        prepare("image_folder", home=tmp_path, source=folder)
    prepare("image_folder", home=tmp_path, source=folder, image_size=6)


def png(width, height):
    """The head of a PNG that claims to be this large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_IMAGES = {
    "empty": b"",
    "text": b"hello",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n",
    "truncated": png(5, 6),
    "bomb": png(10_000, 10_000),
    "large-bomb": png(100_000, 100_000),
}


@pytest.mark.parametrize("content", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_unreadable_images_are_named(tmp_path, folder, content):
    (folder / "val" / "bee" / "bad.png").write_bytes(content)
    with pytest.raises(RequestError, match=r"image .*bad\.png cannot be read"):
        prepare("image_folder", home=tmp_path, source=folder)
    assert not list((tmp_path / "data").iterdir())


def test_folders_that_are_none(tmp_path, folder):
    (folder / "val" / "cow").mkdir()
    with pytest.raises(RequestError, match=r"val/cow is a class that .*train does not have, valid are: ant, bee"):
        prepare("image_folder", home=tmp_path, source=folder)
    shutil.rmtree(folder / "val")
    with pytest.raises(RequestError, match=r"there is no folder test \(or val\)"):
        prepare("image_folder", home=tmp_path, source=folder)
    (folder / "val" / "ant").mkdir(parents=True)
    with pytest.raises(RequestError, match="val has no images"):
        prepare("image_folder", home=tmp_path, source=folder)
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    with pytest.raises(RequestError, match="train has no sub-folders"):
        prepare("image_folder", home=tmp_path, source=folder)
