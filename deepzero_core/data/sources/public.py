"""The public data sets that torchvision reads: CIFAR-10/100, MNIST, Fashion-MNIST, SVHN and STL-10.

Labels and channel order are torchvision's: SVHN's 10 becomes 0, STL-10 counts from 0, images are [C, H, W]. torchvision
holds CIFAR, SVHN and STL-10 files against their official MD5 before it opens them.
"""

import gzip
import hashlib
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepzero_core.data.sources.base import RawData, Request, Source, SourceInfo, register
from deepzero_core.data.torchvision_compat import import_torchvision
from deepzero_core.errors import RequestError, WorkError

_DIGITS = tuple("0123456789")
_STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


@dataclass(frozen=True)
class _File:
    """A file below the data root; md5 is None where the authors published none for it."""

    path: str
    md5: str | None


@dataclass(frozen=True)
class _Family:
    """How torchvision spells one kind of data set.

    Attributes:
        files: the files a data set class reads.
        arguments: what its constructor is called with for the train and for the test split.
        arrays: images uint8 [N, C, H, W] and labels [N] of an instance.
    """

    files: Callable[[Any], list[_File]]
    arguments: dict[str, dict[str, Any]]
    arrays: Callable[[Any], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class _DataSet:
    """One row of the table below. `folder`: where below the data root the files are. `class_names`: None to ask
    torchvision."""

    name: str
    torchvision_name: str
    family: _Family
    folder: str
    url: str
    description: str
    citation: str
    licence: str
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def _cifar_files(cls: Any) -> list[_File]:
    listed = [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]
    return [_File(f"{cls.base_folder}/{name}", md5) for name, md5 in listed]


def _mnist_files(cls: Any) -> list[_File]:
    return [_File(f"{cls.__name__}/raw/{Path(name).stem}", None) for name, _ in cls.resources]


def _svhn_files(cls: Any) -> list[_File]:
    return [_File(name, md5) for _, name, md5 in (cls.split_list["train"], cls.split_list["test"])]


def _stl10_files(cls: Any) -> list[_File]:
    return [_File(f"{cls.base_folder}/{name}", md5) for name, md5 in (*cls.train_list, *cls.test_list)]


_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_BY_NAME = {"train": {"split": "train"}, "test": {"split": "test"}}
_CIFAR = _Family(_cifar_files, _BY_FLAG, lambda d: (d.data.transpose(0, 3, 1, 2), np.asarray(d.targets)))
_MNIST = _Family(_mnist_files, _BY_FLAG, lambda d: (d.data.numpy()[:, None], d.targets.numpy()))
_SVHN = _Family(_svhn_files, _BY_NAME, lambda d: (d.data, d.labels))
_STL10 = _Family(_stl10_files, _BY_NAME, lambda d: (d.data, d.labels))

_TABLE = (
    _DataSet(
        "cifar10",
        "CIFAR10",
        _CIFAR,
        "cifar-10-batches-py",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "photographs, 32x32 colour, 10 classes",
        "CIFAR-10, Krizhevsky 2009",
        "none stated",
        # The constants that the literature uses, rounded as it rounds them.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
    ),
    _DataSet(
        "cifar100",
        "CIFAR100",
        _CIFAR,
        "cifar-100-python",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "photographs, 32x32 colour, 100 classes",
        "CIFAR-100, Krizhevsky 2009",
        "none stated",
    ),
    _DataSet(
        "mnist",
        "MNIST",
        _MNIST,
        "MNIST/raw",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "handwritten digits, 28x28 grey, 10 classes",
        "MNIST, LeCun, Cortes and Burges 1998",
        "CC BY-SA 3.0",
        class_names=_DIGITS,
    ),
    _DataSet(
        "fashion_mnist",
        "FashionMNIST",
        _MNIST,
        "FashionMNIST/raw",
        "https://github.com/zalandoresearch/fashion-mnist",
        "articles of clothing, 28x28 grey, 10 classes",
        "Fashion-MNIST, Xiao, Rasul and Vollgraf 2017",
        "MIT",
    ),
    _DataSet(
        "svhn",
        "SVHN",
        _SVHN,
        "",
        "http://ufldl.stanford.edu/housenumbers/",
        "house numbers, 32x32 colour, 10 classes",
        "Street View House Numbers, Netzer et al. 2011",
        "non-commercial use",
        class_names=_DIGITS,
    ),
    _DataSet(
        "stl10",
        "STL10",
        _STL10,
        "stl10_binary",
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "photographs, 96x96 colour, 10 classes (labelled part)",
        "STL-10, Coates, Lee and Ng 2011",
        "none stated",
        class_names=_STL10_CLASSES,
    ),
)


def _read(data_set: _DataSet, request: Request) -> RawData:
    """Read both splits through torchvision.

    Raises:
        RequestError: files missing or damaged; says which, and where they belong.
        WorkError: the download failed.
    """
    cls = _torchvision_class(data_set)
    root = _above(request.root, data_set.folder)
    if request.download:
        _download(data_set, cls, root)
    if data_set.family is _MNIST:
        root = _unpacked(cls, root, request.scratch)
    _require_files(data_set, cls, root)
    family, splits = data_set.family, {}
    class_names = data_set.class_names
    for split, arguments in family.arguments.items():
        try:
            instance = cls(str(root), download=False, **arguments)
            splits[split] = family.arrays(instance)
        # torchvision's readers meet damaged files with nearly any exception.
        except Exception as error:
            _require_official(data_set, cls, root)
            raise RequestError(
                f"the {split} files of data set {data_set.name!r} in {root / data_set.folder} are damaged "
                f"({type(error).__name__}: {error}); get them again from {data_set.url}"
            ) from None
        class_names = class_names or tuple(instance.classes)
    return RawData(splits, f"{data_set.citation}, {data_set.url}", class_names or (), data_set.mean, data_set.std)


def _torchvision_class(data_set: _DataSet) -> Any:
    try:
        datasets = import_torchvision().datasets
    except ImportError as error:
        raise RequestError(
            f"data set {data_set.name!r} is read through torchvision, which cannot be imported ({error}); "
            "`deepzero doctor` looks into it"
        ) from None
    cls = getattr(datasets, data_set.torchvision_name)
    if data_set.family is _STL10:
        # torchvision insists on the 2.6 GB of unlabelled images, which nothing here looks at.
        return type(cls.__name__, (cls,), {"train_list": cls.train_list[:2]})
    return cls


def _above(root: Path, folder: str) -> Path:
    """The data root, also where the user named the folder inside it that holds the files."""
    parts = Path(folder).parts
    if not (root / folder).is_dir():
        for depth in range(len(parts), 0, -1):
            if root.parts[-depth:] == parts[:depth]:
                return root.parents[depth - 1]
    return root


def _download(data_set: _DataSet, cls: Any, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        for arguments in data_set.family.arguments.values():
            cls(str(root), download=True, **arguments)
    # urllib's errors are OSErrors; torchvision adds RuntimeErrors of its own.
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise WorkError(
            f"downloading data set {data_set.name!r} from {data_set.url} failed ({reason}); "
            f"its files can be put into {root / data_set.folder} by hand"
        ) from None


def _unpacked(cls: Any, root: Path, scratch: Path) -> Path:
    """A root that holds the MNIST files unpacked: `root`, or `scratch` where `root` has them as published, in .gz."""
    folder = root / cls.__name__ / "raw"
    archives = {folder / name: md5 for name, md5 in cls.resources}
    if all(path.with_suffix("").exists() for path in archives) or not all(path.exists() for path in archives):
        return root
    target = scratch / cls.__name__ / "raw"
    target.mkdir(parents=True)
    for path, md5 in archives.items():
        _require_md5([(path, md5)])
        try:
            with gzip.open(path) as packed, (target / path.stem).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RequestError(f"{path} is damaged ({error}); get it again") from None
    return scratch


def _require_files(data_set: _DataSet, cls: Any, root: Path) -> None:
    expected = data_set.family.files(cls)
    missing = [file for file in expected if not (root / file.path).is_file()]
    if missing:
        folder = root / data_set.folder
        raise RequestError(
            f"data set {data_set.name!r} needs {_names(expected)} in {folder}, and {_names(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; get them from {data_set.url}, or name the folder "
            f"{f'above {data_set.folder}' if data_set.folder else 'that has them'} as the source or in "
            "DEEPZERO_DATA_ROOT, or allow the download"
        )


def _require_official(data_set: _DataSet, cls: Any, root: Path) -> None:
    """Name the file that is not what the authors published."""
    _require_md5([(root / file.path, file.md5) for file in data_set.family.files(cls) if file.md5])


def _require_md5(files: Iterable[tuple[Path, str]]) -> None:
    for path, expected in files:
        with path.open("rb") as stream:
            actual = hashlib.file_digest(stream, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        if actual != expected:
            raise RequestError(f"{path} is damaged: its md5 is {actual}, the published one {expected}; get it again")


def _names(files: Iterable[_File]) -> str:
    return ", ".join(Path(file.path).name for file in files)


for _row in _TABLE:
    register(
        Source(
            SourceInfo(
                _row.name,
                _row.description,
                _row.licence,
                f"the files of {_row.url} in DATA_ROOT/{_row.folder}".rstrip("/"),
            ),
            partial(_read, _row),
            options=frozenset({"source", "download"}),
        )
    )
