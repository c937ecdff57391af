"""The public data sets: real files where they are at hand, else small files that torchvision's own readers read."""

import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from deepzero_core.data import Augmentation, BatchSource, ImageStore, import_torchvision, prepare
from deepzero_core.data.store import channel_statistics
from deepzero_core.errors import RequestError, WorkError

ROOT = os.environ.get("DEEPZERO_DATA_ROOT")
RNG = np.random.default_rng(0)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def needs(folder):
    there = ROOT is not None and (Path(ROOT) / folder).is_dir()
    return pytest.mark.skipif(not there, reason=f"DEEPZERO_DATA_ROOT names no folder with {folder}")


# --- real files ---


@needs("cifar-10-batches-py")
def test_real_cifar10(tmp_path):
    prepared = prepare("cifar10", home=tmp_path)
    assert prepared.written
    assert not prepare("cifar10", home=tmp_path).written
    store = ImageStore.open(prepared, verify=True)
    assert store.manifest.class_names[:3] == ("airplane", "automobile", "bird")
    assert store.manifest.mean == (0.4914, 0.4822, 0.4465)
    assert store.manifest.std == (0.2471, 0.2435, 0.2616)
    train, test = store.split("train"), store.split("test")
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    with (Path(ROOT) / "cifar-10-batches-py" / "data_batch_2").open("rb") as stream:
        raw = pickle.load(stream, encoding="bytes")
    np.testing.assert_array_equal(train.images[10_000:20_000].reshape(10_000, -1), raw[b"data"])
    np.testing.assert_array_equal(train.labels[10_000:20_000], raw[b"labels"])
    mean, std = channel_statistics(train.images)
    np.testing.assert_allclose(mean, store.manifest.mean, atol=6e-5)
    np.testing.assert_allclose(std, store.manifest.std, atol=1e-4)


@needs("cifar-10-batches-py")
def test_real_batches_are_quick(tmp_path):
    """A few milliseconds; the bound is wide because test machines are shared."""
    store = ImageStore.open(prepare("cifar10", home=tmp_path))
    statistics = {"mean": store.manifest.mean, "std": store.manifest.std}
    batches = BatchSource(
        store.split("train"), batch_size=256, seed=0, augmentation=Augmentation(4, flip=True), **statistics
    )
    times = []
    for index in range(100):
        start = time.perf_counter()
        batches.batch(0, index)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 0.02


@needs("FashionMNIST")
@pytest.mark.parametrize("inside", ["", "FashionMNIST", "FashionMNIST/raw"])
def test_real_fashion_mnist(tmp_path, inside):
    store = ImageStore.open(prepare("fashion_mnist", home=tmp_path, source=Path(ROOT) / inside))
    assert store.manifest.class_names[0] == "T-shirt/top"
    assert store.manifest.licence == "MIT"
    for split, prefix in (("train", "train"), ("test", "t10k")):
        raw = Path(ROOT) / "FashionMNIST" / "raw"
        images = gzip.decompress((raw / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((raw / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        assert store.split(split).images.tobytes() == images
        assert store.split(split).labels.tolist() == list(labels)
    # The values that the literature uses for this data set.
    np.testing.assert_allclose(store.manifest.mean, [0.2860], atol=5e-5)
    np.testing.assert_allclose(store.manifest.std, [0.3530], atol=5e-5)


@needs("FashionMNIST")
def test_real_fashion_mnist_as_published(tmp_path):
    """Only the .gz files, as they are downloaded."""
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (Path(ROOT) / "FashionMNIST" / "raw").glob("*.gz"):
        (raw / path.name).symlink_to(path)
    store = ImageStore.open(prepare("fashion_mnist", home=tmp_path, source=tmp_path / "root"))
    assert store.manifest.counts == {"train": 60_000, "test": 10_000}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["fashion_mnist"]


# --- files made here, read by torchvision ---


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 12), ("t10k", 5)):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(RNG.integers(0, 256, (count, 28, 28))))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return tmp_path / "root"


def test_mnist(tmp_path, mnist):
    store = ImageStore.open(prepare("mnist", home=tmp_path, source=mnist))
    assert store.manifest.image_shape == (1, 28, 28)
    assert store.manifest.class_names == tuple("0123456789")
    images = (mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    assert store.split("train").images.tobytes() == images
    assert store.split("test").labels.tolist() == [0, 1, 2, 3, 4]


def test_data_root_comes_from_the_environment_or_is_below_home(tmp_path, mnist, monkeypatch):
    monkeypatch.setenv("DEEPZERO_DATA_ROOT", str(mnist))
    assert prepare("mnist", home=tmp_path / "a").written
    monkeypatch.delenv("DEEPZERO_DATA_ROOT")
    (tmp_path / "b").mkdir()
    mnist.rename(tmp_path / "b" / "raw")
    assert prepare("mnist", home=tmp_path / "b").written


@pytest.mark.parametrize("content", [b"", b"hello", bytes(16), idx(np.zeros((12, 28, 28)))[:-100]])
def test_damaged_mnist(tmp_path, mnist, content):
    (mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(RequestError, match=r"the train files of data set 'mnist' in .*MNIST/raw are damaged"):
        prepare("mnist", home=tmp_path, source=mnist)


def test_mnist_with_labels_and_images_of_different_number(tmp_path, mnist):
    (mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(4)))
    with pytest.raises(RequestError, match=r"labels of the test split of data set 'mnist' have to be integers \[5\]"):
        prepare("mnist", home=tmp_path, source=mnist)


def test_damaged_archive(tmp_path, mnist):
    raw = mnist / "MNIST" / "raw"
    for path in list(raw.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(RequestError, match=r"ubyte\.gz is damaged: its md5 is \w+, the published one \w+"):
        prepare("mnist", home=tmp_path, source=mnist)


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    cls = import_torchvision().datasets.SVHN
    images = RNG.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    listed = dict(cls.split_list)
    for split in ("train", "test"):
        path = tmp_path / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": images, "y": np.array([[10], [1], [9], [2]], dtype=np.uint8)})
        listed[split] = ["http://localhost/", path.name, md5(path)]
    monkeypatch.setattr(cls, "split_list", listed)
    return images


def test_svhn_label_ten_is_zero(tmp_path, svhn):
    store = ImageStore.open(prepare("svhn", home=tmp_path, source=tmp_path))
    assert store.split("train").labels.tolist() == [0, 1, 9, 2]
    np.testing.assert_array_equal(store.split("train").images, svhn.transpose(3, 2, 0, 1))


def test_stl10_counts_from_zero_and_does_without_the_unlabelled(tmp_path, monkeypatch):
    cls = import_torchvision().datasets.STL10
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    columns = RNG.integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    lists = {"train_list": [], "test_list": []}
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(columns.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes([1, 10, 5]))
        for kind in "Xy":
            lists[f"{split}_list"].append([f"{split}_{kind}.bin", md5(folder / f"{split}_{kind}.bin")])
    monkeypatch.setattr(cls, "train_list", [*lists["train_list"], *cls.train_list[2:]])
    monkeypatch.setattr(cls, "test_list", lists["test_list"])
    store = ImageStore.open(prepare("stl10", home=tmp_path, source=tmp_path))
    assert store.split("train").labels.tolist() == [0, 9, 4]
    assert store.manifest.class_names[0] == "airplane"
    # The files store columns, images are rows.
    np.testing.assert_array_equal(store.split("test").images, columns.transpose(0, 1, 3, 2))


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    cls = import_torchvision().datasets.CIFAR100
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    data = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
    contents = {
        "train": {"data": data, "fine_labels": [0, 99, 5, 7], "coarse_labels": [0, 1, 2, 3]},
        "test": {"data": data, "fine_labels": [1, 2, 3, 4], "coarse_labels": [0, 1, 2, 3]},
        "meta": {"fine_label_names": [f"class{number}" for number in range(100)]},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(cls, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(cls, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(folder / "meta")})
    return data


def test_cifar100_has_fine_labels(tmp_path, cifar100):
    store = ImageStore.open(prepare("cifar100", home=tmp_path, source=tmp_path))
    assert store.split("train").labels.tolist() == [0, 99, 5, 7]
    np.testing.assert_array_equal(store.split("train").images.reshape(4, -1), cifar100)
    assert store.manifest.num_classes == 100


def test_file_that_is_not_the_published_one_is_named_and_not_unpickled(tmp_path, cifar100):
    sprung = tmp_path / "sprung"
    trap = b"cbuiltins\nopen\n(S'" + str(sprung).encode() + b"'\nS'w'\ntR."
    (tmp_path / "cifar-100-python" / "train").write_bytes(trap)
    with pytest.raises(RequestError, match=r"cifar-100-python/train is damaged: its md5 is \w+, the published one \w+"):
        prepare("cifar100", home=tmp_path, source=tmp_path)
    assert not sprung.exists()


# --- files that are not there ---

PLACES = {
    "cifar10": (
        "cifar-10-batches-py",
        "data_batch_1, data_batch_2, data_batch_3, data_batch_4",
    ),
    "cifar100": ("cifar-100-python", "train, test, meta"),
    "mnist": ("MNIST/raw", "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte"),
    "fashion_mnist": ("FashionMNIST/raw", "train-images-idx3-ubyte, train-labels-idx1-ubyte"),
    "svhn": ("", "train_32x32.mat, test_32x32.mat"),
    "stl10": ("stl10_binary", "train_X.bin, train_y.bin, test_X.bin, test_y.bin"),
}


@pytest.mark.parametrize(("name", "place"), PLACES.items(), ids=PLACES.keys())
def test_missing_files_are_named_with_their_place(tmp_path, name, place):
    folder, files = place
    with pytest.raises(RequestError) as caught:
        prepare(name, home=tmp_path, source=tmp_path / "root")
    message = str(caught.value)
    assert f"data set '{name}' needs {files}" in message
    assert f"in {tmp_path / 'root' / folder}, and" in message
    assert "are missing; get them from http" in message
    assert "DEEPZERO_DATA_ROOT" in message
    assert "\n" not in message


def test_one_missing_file(tmp_path, mnist):
    (mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(RequestError, match="and t10k-labels-idx1-ubyte is missing; "):
        prepare("mnist", home=tmp_path, source=mnist)


def test_failed_download(tmp_path, monkeypatch):
    """Nobody listens on that port: the same as a machine without a network, but at once."""
    cls = import_torchvision().datasets.CIFAR10
    monkeypatch.setattr(cls, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(WorkError, match=r"downloading data set 'cifar10' from .* failed .*by hand") as caught:
        prepare("cifar10", home=tmp_path, source=tmp_path / "root", download=True)
    assert "\n" not in str(caught.value)


def test_torchvision_imports_beside_any_torch():
    """In a fresh interpreter, twice, without a warning; and its data sets and transforms are there."""
    code = (
        "from deepzero_core.data.torchvision_compat import import_torchvision as load\n"
        "first = load()\n"
        "assert load() is first\n"
        "import torch, torchvision.transforms.v2 as v2\n"
        "assert v2.functional.horizontal_flip(torch.arange(3.0).reshape(1, 1, 3)).flatten().tolist() == [2, 1, 0]\n"
        "assert first.datasets.CIFAR10.base_folder == 'cifar-10-batches-py'\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
