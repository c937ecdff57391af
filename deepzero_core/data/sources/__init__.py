"""Where images come from: `available` lists the sources, `prepare` turns one into a store."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from deepzero_core.data.files import staging_folder
from deepzero_core.data.manifest import Manifest

# Imported for their effect: each module registers its sources, in the order in which they are listed.
from deepzero_core.data.sources import digits, folder, npz, public  # noqa: F401
from deepzero_core.data.sources.base import SOURCES, Request, Source, SourceInfo
from deepzero_core.data.store import ImageStore, publish
from deepzero_core.errors import RequestError, suggest

__all__ = ["Prepared", "SourceInfo", "available", "prepare", "prepared_stores"]

DATA_ROOT = "DEEPZERO_DATA_ROOT"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did. Can be used wherever a path is expected, e.g. `ImageStore.open(prepared)`.

    Attributes:
        path: folder of the store.
        manifest: its manifest.
        written: False where an intact store was there already and nothing was done.
    """

    path: Path
    manifest: Manifest
    written: bool

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def available() -> list[SourceInfo]:
    """All sources, the one that needs nothing first."""
    return [source.info for source in SOURCES.values()]


def prepare(
    name: str,
    *,
    home: Path,
    source: Path | None = None,
    force: bool = False,
    download: bool = False,
    image_size: int | None = None,
) -> Prepared:
    """Make the store of a data set, unless it is there already.

    The store is `home/data/NAME`, for a user's own data `home/data/NAME-…` with the beginning of the sha256 of what was
    read, so that changed data make a new store.

    Args:
        name: one of `available()`.
        home: folder of deepzero's state.
        source: where the files are. For the public data sets the folder that torchvision calls root, by default
            the environment variable DEEPZERO_DATA_ROOT or else `home/raw`; for image_folder the folder; for npz the
            file.
        force: read the source again and mend or replace the store.
        download: let torchvision fetch what is missing.
        image_size: image_folder only: bring all images to this height and width, in pixels.

    Raises:
        RequestError: an unknown name, files missing or damaged, data that make no data set, a damaged store.
        WorkError: the download or the disk failed.
    """
    origin = _source(name)
    _check_options(name, origin, source, download, image_size)
    home = Path(home).expanduser()
    root = Path(source or os.environ.get(DATA_ROOT) or home / "raw").expanduser()
    request = Request(name, root, scratch=home, download=download, image_size=image_size)
    with _reading(request):
        fingerprint = origin.fingerprint(request) if origin.fingerprint else ""
    target = home / "data" / (f"{name}-{fingerprint[:12]}" if fingerprint else name)
    if target.exists() and not force:
        return Prepared(target, ImageStore.open(target).manifest, written=False)

    with staging_folder(target) as scratch:
        with _reading(request):
            data = origin.read(replace(request, scratch=scratch, fingerprint=fingerprint))
        manifest, written = publish(
            target,
            data.splits,
            name=name,
            source=data.source,
            licence=origin.info.licence,
            class_names=data.class_names,
            mean=data.mean,
            std=data.std,
        )
    return Prepared(target, manifest, written)


def prepared_stores(name: str, *, home: Path) -> list[Path]:
    """Folders of the stores of `name` that are there: one, or one for each of a user's own data; possibly damaged.

    Raises:
        RequestError: an unknown name, or one that was never prepared.
    """
    data = Path(home).expanduser() / "data"
    own = _source(name).fingerprint is not None
    found = sorted(path for path in data.glob(f"{name}-*" if own else name) if path.is_dir())
    if not found:
        raise RequestError(f"data set {name!r} has no store in {data}; `deepzero data prepare {name}` makes one")
    return found


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise RequestError(f"unknown data set {name!r}, {suggest(name, SOURCES)}")
    return SOURCES[name]


def _check_options(name: str, origin: Source, source: Path | None, download: bool, image_size: int | None) -> None:
    if source is not None and "source" not in origin.options:
        raise RequestError(f"data set {name!r} needs no source, it is built in; leave the source {source} out")
    if source is None and origin.fingerprint is not None:
        raise RequestError(
            f"data set {name!r} needs a source that is not given: {origin.info.needs.removeprefix('a source: ')}"
        )
    if download and "download" not in origin.options:
        raise RequestError(f"data set {name!r} cannot be downloaded; ask for it without the download")
    if image_size is not None and "image_size" not in origin.options:
        raise RequestError(f"images of data set {name!r} have one size; an image size is for 'image_folder' only")
    if image_size is not None and image_size < 1:
        raise RequestError(f"the image size has to be at least 1 pixel, got {image_size}")


@contextmanager
def _reading(request: Request) -> Iterator[None]:
    """Turn what the operating system refuses while a source is read into a sentence."""
    try:
        yield
    except OSError as error:
        # No space left on the device: the source is innocent.
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        path = error.filename or request.root
        raise RequestError(f"data set {request.name!r} cannot be read: {path}: {error.strerror or error}") from None
