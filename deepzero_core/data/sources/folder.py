"""A folder of images of the user's, one sub-folder per class."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from deepzero_core.data.files import sha256
from deepzero_core.data.sources.base import RawData, Request, Source, SourceInfo, register
from deepzero_core.errors import RequestError, suggest

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"})
# Pillow opens other formats as well, some of them (EPS) by starting another program.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF")
_TEST_FOLDERS = ("test", "val")


@dataclass(frozen=True)
class _Files:
    """Image files of a split with their labels, sorted by class and then by path."""

    paths: list[Path]
    labels: list[int]


def read(request: Request) -> RawData:
    """Images as RGB, uint8 [N, 3, H, W], from train/CLASS/* and test/CLASS/* (or val/CLASS/*) below the source.

    With an image size, the shorter side is resized to it (bilinear) and the centre cut out; without one, all images
    have to have one size. Classes are the sub-folders of train/, in alphabetical order.
    """
    class_names, splits = _scan(request)
    first = splits["train"].paths[0]
    side = request.image_size
    height, width = (side, side) if side else _decode(first, None).shape[1:]
    arrays = {}
    for split, files in splits.items():
        # On disk rather than in memory: such folders can be larger than the machine's memory. Written as a stream
        # because a disk that fills up under a writable map kills the process.
        with (request.scratch / split).open("wb") as stream:
            for path in files.paths:
                image = _decode(path, side)
                if image.shape != (3, height, width):
                    raise RequestError(
                        f"{path} is {image.shape[2]}x{image.shape[1]} pixels and {first} is {width}x{height}; "
                        "set an image size to bring all to one"
                    )
                stream.write(image.tobytes())
        images = np.memmap(stream.name, dtype=np.uint8, mode="r", shape=(len(files.paths), 3, height, width))
        arrays[split] = images, np.array(files.labels, dtype=np.int64)
    return RawData(
        splits=arrays,
        source=f"folder {request.root.resolve().name}, sha256 {request.fingerprint}",
        class_names=class_names,
    )


def fingerprint(request: Request) -> str:
    """sha256 over class names, relative paths and contents of the image files, and the image size."""
    class_names, splits = _scan(request)
    hasher = hashlib.sha256(repr((request.image_size, class_names)).encode())
    for split, files in splits.items():
        for path in files.paths:
            hasher.update(os.fsencode(f"{split}/{path.parent.name}/{path.name}") + b"\0")
            try:
                hasher.update(sha256(path).encode())
            except OSError as error:
                raise RequestError(f"image {path} cannot be read ({error.strerror})") from None
    return hasher.hexdigest()


def _scan(request: Request) -> tuple[tuple[str, ...], dict[str, _Files]]:
    root = request.root
    test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        missing = "train" if not (root / "train").is_dir() else "test (or val)"
        raise RequestError(
            f"data set 'image_folder' expects {root}/train/CLASS/* and {root}/test/CLASS/* (or val), "
            f"and there is no folder {missing}"
        )
    class_names = _class_folders(root / "train")
    if not class_names:
        raise RequestError(f"{root / 'train'} has no sub-folders; put the images of each class into one")
    for name in _class_folders(test):
        if name not in class_names:
            raise RequestError(
                f"{test / name} is a class that {root / 'train'} does not have, {suggest(name, class_names)}"
            )
    return class_names, {"train": _images_of(root / "train", class_names), "test": _images_of(test, class_names)}


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _images_of(folder: Path, class_names: Sequence[str]) -> _Files:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        if not (folder / name).is_dir():
            continue
        found = sorted(
            path
            for path in (folder / name).iterdir()
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
        )
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise RequestError(f"{folder} has no images; they are expected at {folder}/CLASS/*.jpg, .png or the like")
    return _Files(paths, labels)


def _decode(path: Path, side: int | None) -> np.ndarray:
    """One image as uint8 [3, H, W]."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A few kilobytes that unpack to gigabytes: Pillow only warns up to a point.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                converted = image.convert("RGB")
        if side is not None:
            converted = ImageOps.fit(converted, (side, side), Image.Resampling.BILINEAR)
        return np.asarray(converted).transpose(2, 0, 1)
    # Pillow's decoders meet damaged files with nearly any exception: OSError, SyntaxError, struct.error, IndexError …
    except Exception as error:
        raise RequestError(f"image {path} cannot be read ({type(error).__name__}: {error})") from None


register(
    Source(
        SourceInfo(
            "image_folder",
            "any folder with train/CLASS/* and test/CLASS/* (or val/CLASS/*), read as RGB",
            "as the owner says",
            "a source: the folder; an image size where the images differ in size",
        ),
        read,
        fingerprint,
        frozenset({"source", "image_size"}),
    )
)
