"""What a source of images is, and the registry of all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class SourceInfo:
    """One line of `deepzero data list`.

    Attributes:
        name: what `prepare` is called with.
        description: what the images show, with size and number of classes.
        licence: terms of the data.
        needs: what has to be on the disk first; empty where nothing has to be.
    """

    name: str
    description: str
    licence: str
    needs: str


@dataclass(frozen=True)
class Request:
    """What a reader is asked for.

    Attributes:
        name: the data set.
        root: folder or file to read from; chosen by the user, or the default place.
        scratch: folder for temporary files, removed afterwards.
        download: whether the network may be used.
        image_size: height and width to resize to, in pixels; None keeps the size.
        fingerprint: what `Source.fingerprint` found, where the source has one.
    """

    name: str
    root: Path
    scratch: Path
    download: bool = False
    image_size: int | None = None
    fingerprint: str = ""


@dataclass(frozen=True, eq=False)
class RawData:
    """What a reader gives back: the arguments of `write_store`. Mean and std are None where nobody published them."""

    splits: Mapping[str, tuple[np.ndarray, np.ndarray]]
    source: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Source:
    """A registered source.

    Attributes:
        info: its description.
        read: reads everything; raises RequestError for what the user can put right.
        fingerprint: for the user's own data, the sha256 in hex of what `read` would read; names the store. None for
            data sets of which there is only one.
        options: which of "source", "download", "image_size" the source understands.
    """

    info: SourceInfo
    read: Callable[[Request], RawData]
    fingerprint: Callable[[Request], str] | None = None
    options: frozenset[str] = frozenset()


SOURCES: dict[str, Source] = {}


def register(source: Source) -> None:
    """Add a source. Raises ValueError for a name already taken."""
    if source.info.name in SOURCES:
        raise ValueError(f"source {source.info.name!r} is registered twice")
    SOURCES[source.info.name] = source
