"""A NumPy archive of the user's."""

import zipfile
from pathlib import Path

import numpy as np

from deepzero_core.data.files import sha256
from deepzero_core.data.sources.base import RawData, Request, Source, SourceInfo, register
from deepzero_core.data.sources.splitting import stratified_split
from deepzero_core.errors import RequestError, suggest

_KEYS = ("images", "labels", "test_images", "test_labels", "class_names")


def read(request: Request) -> RawData:
    """Images uint8 [N, H, W] or [N, C, H, W] and labels integer [N], from arrays named as in `_KEYS`.

    Without a test split, a fifth is set aside. Without class names, classes are called "0", "1", … Object arrays are
    refused: reading them would run code from the file.
    """
    path = request.root
    arrays = _load(request)
    for key in ("images", "labels"):
        if key not in arrays:
            present = f"; it holds {', '.join(sorted(arrays))}" if arrays else ""
            raise RequestError(f"{path} has no array {key!r}{present}")
    if ("test_images" in arrays) != ("test_labels" in arrays):
        raise RequestError(f"{path} has only one of 'test_images' and 'test_labels'; give both or neither")

    images, labels = _images(request, arrays["images"], "images"), _labels(request, arrays, "images", "labels")
    if "test_images" in arrays:
        test = (
            _images(request, arrays["test_images"], "test_images"),
            _labels(request, arrays, "test_images", "test_labels"),
        )
        splits = {"train": (images, labels), "test": test}
    else:
        train_indices, test_indices = stratified_split(labels, name=request.name)
        splits = {
            "train": (images[train_indices], labels[train_indices]),
            "test": (images[test_indices], labels[test_indices]),
        }
    return RawData(
        splits=splits,
        source=f"{path.name}, sha256 {request.fingerprint}",
        class_names=_class_names(request, arrays, splits),
    )


def fingerprint(request: Request) -> str:
    """sha256 of the file."""
    _require_file(request)
    return sha256(request.root)


def _require_file(request: Request) -> None:
    if not request.root.is_file():
        raise RequestError(
            f"data set 'npz' reads a .npz file with the arrays images and labels, and {request.root} is not a file; "
            "name one as the source"
        )


def _load(request: Request) -> dict[str, np.ndarray]:
    path = request.root
    _require_file(request)
    with path.open("rb") as stream:
        try:
            archive = np.load(stream, allow_pickle=False)
        # A pickle is a ValueError, other files that are no archives are any of these.
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise RequestError(f"{path} is not a readable .npz archive ({error})") from None
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise RequestError(f"{path} is a single array, not an .npz archive; write it with numpy.savez")
        unknown = [key for key in archive.files if key not in _KEYS]
        if unknown and not {"images", "labels"} <= set(archive.files):
            raise RequestError(f"{path} has an array {unknown[0]!r} that has no meaning, {suggest(unknown[0], _KEYS)}")
        return {key: _member(path, archive, key) for key in _KEYS if key in archive.files}


def _member(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        array = archive[key]
    # NumPy and zipfile meet damaged members with nearly any exception, a MemoryError for absurd shapes among them.
    except Exception as error:
        reason = "it holds Python objects" if "allow_pickle" in str(error) else f"{type(error).__name__}: {error}"
        raise RequestError(f"array {key!r} of {path} cannot be read ({reason})") from None
    if not isinstance(array, np.ndarray):
        raise RequestError(f"{key!r} of {path} is not an array; write the archive with numpy.savez")
    return array


def _images(request: Request, images: np.ndarray, key: str) -> np.ndarray:
    where = f"array {key!r} of {request.root}"
    if images.dtype != np.uint8:
        raise RequestError(f"{where} is {images.dtype}, images have to be uint8 with values 0 to 255")
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.size == 0:
        raise RequestError(f"{where} has shape {[*images.shape]}, images have to be [N, H, W] or [N, C, H, W]")
    if images.shape[3] in (1, 3, 4) and images.shape[1] > 4:
        raise RequestError(
            f"{where} has shape {[*images.shape]}, which looks like [N, H, W, C]; "
            "store images.transpose(0, 3, 1, 2) instead"
        )
    return images


def _labels(request: Request, arrays: dict[str, np.ndarray], images_key: str, key: str) -> np.ndarray:
    labels, count = arrays[key], len(arrays[images_key])
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise RequestError(
            f"array {key!r} of {request.root} is {labels.dtype} {[*labels.shape]}, "
            f"labels have to be integers [{count}], one for each image"
        )
    if labels.min() < 0 or labels.max() >= 2**63:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise RequestError(f"array {key!r} of {request.root} holds the label {wrong}, labels are 0, 1, 2, …")
    return labels.astype(np.int64)


def _class_names(
    request: Request, arrays: dict[str, np.ndarray], splits: dict[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[str, ...]:
    largest = max(int(labels.max()) for _, labels in splits.values())
    examples = sum(len(labels) for _, labels in splits.values())
    if "class_names" in arrays:
        names = arrays["class_names"]
        if names.dtype.kind != "U" or names.ndim != 1:
            raise RequestError(
                f"array 'class_names' of {request.root} is {names.dtype} {[*names.shape]}, it has to be strings [K]"
            )
        return tuple(names.tolist())
    if largest >= examples:
        raise RequestError(
            f"{request.root} has the label {largest} among {examples} examples; number the classes 0, 1, 2, … "
            "without gaps"
        )
    return tuple(str(label) for label in range(largest + 1))


register(
    Source(
        SourceInfo(
            "npz",
            "any NumPy archive: images uint8 [N, H, W] or [N, C, H, W], labels [N], "
            "optionally test_images, test_labels, class_names",
            "as the owner says",
            "a source: the .npz file",
        ),
        read,
        fingerprint,
        frozenset({"source"}),
    )
)
