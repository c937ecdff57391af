"""The image store: a folder with one Arrow IPC file per split and a manifest.

Formats: images uint8 [N, C, H, W]; labels int64 [N]. In a file both are columns of a single record batch, the images as
FixedSizeList<uint8>[C·H·W], so that a split is one contiguous stretch of the memory-mapped file and nothing is copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from deepzero_core.data import files
from deepzero_core.data.manifest import FILES, MANIFEST_FILE, SCHEMA_VERSION, SPLITS, Manifest
from deepzero_core.errors import RequestError, suggest

Images: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Labels: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

# Images looked at together when mean and std are computed; bounds the memory, not the result.
_STATISTICS_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a store, or arrays handed in by the caller.

    Attributes:
        images: uint8 [N, C, H, W]; read-only and zero-copy when it comes from a store.
        labels: int64 [N].
        origin: (store folder, split name, manifest digest) when it comes from a store. A pickled split then carries
            only this and maps the file again where it arrives, which must see the same file system.
    """

    images: Images
    labels: Labels
    origin: tuple[str, str, str] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.origin is None:
            return Split, (self.images, self.labels)
        return _reopen, self.origin


@dataclass(frozen=True, eq=False)
class ImageStore:
    """A store opened for reading; get one through `ImageStore.open`."""

    path: Path
    manifest: Manifest
    splits: Mapping[str, Split] = field(repr=False)

    @classmethod
    def open(cls, path: str | PathLike[str], *, verify: bool = False) -> "ImageStore":
        """Map a store into memory: milliseconds, whatever its size.

        File sizes and the Arrow layout are held against the manifest, so truncation is noticed here; `verify=True`
        hashes every file as well.

        Raises:
            RequestError: no store there, an unreadable manifest, or a file missing or damaged (it is named).
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        _check_sizes(folder, manifest)
        if verify:
            _check_hashes(folder, manifest)
        return cls(folder, manifest, {name: _map_split(folder, manifest, name) for name in SPLITS})

    def split(self, name: str) -> Split:
        """The split "train" or "test". Raises RequestError for any other name."""
        if name not in self.splits:
            raise RequestError(f"data set {self.manifest.name!r} has no split {name!r}: {suggest(name, self.splits)}")
        return self.splits[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageStore.open, (str(self.path),)


def verify(path: str | PathLike[str]) -> Manifest:
    """Hash every file of the store and return its manifest.

    Raises:
        RequestError: damage; names the file, the expected and the actual sha256, and how to mend it.
    """
    return ImageStore.open(path, verify=True).manifest


def write_store(
    path: str | PathLike[str],
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    name: str,
    source: str,
    licence: str,
    class_names: Sequence[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Manifest:
    """Write a store, atomically: it is there completely or not at all, also when two processes write it at once.

    A store of the same digest whose files are intact is left as it is; any other store in its place is replaced.

    Args:
        path: folder of the store; anything but a store (or an empty folder) in its place is refused.
        splits: {"train": (images uint8 [N, C, H, W], labels integer [N]), "test": …}.
        name, source, licence, class_names: see `Manifest`.
        mean, std: per channel in units of [0, 1]; computed over the train split where None.

    Raises:
        RequestError: wrong shapes, types or labels; a place that cannot be used.
        WorkError: the disk failed or is full.
    """
    return publish(
        path, splits, name=name, source=source, licence=licence, class_names=class_names, mean=mean, std=std
    )[0]


def publish(
    path: str | PathLike[str],
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    name: str,
    source: str,
    licence: str,
    class_names: Sequence[str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Manifest, bool]:
    """As `write_store`; also says whether anything was written (False: an intact store of this digest was there)."""
    # A link to a larger disk stays a link: the folder that it points to is what gets replaced.
    folder = Path(path).resolve()
    splits = {split: (np.asarray(images), np.asarray(labels)) for split, (images, labels) in splits.items()}
    shape = _check_arrays(splits, name, class_names)
    if mean is None or std is None:
        computed = channel_statistics(splits["train"][0])
        mean, std = computed[0] if mean is None else mean, computed[1] if std is None else std

    with files.staging_folder(folder) as staging:
        described: dict[str, tuple[str, int]] = {}
        for split in SPLITS:
            images, labels = splits[split]
            files.write_arrow(staging / FILES[split], _record_batch(images, labels))
            described[FILES[split]] = files.sha256(staging / FILES[split]), (staging / FILES[split]).stat().st_size
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            source=source,
            licence=licence,
            class_names=tuple(class_names),
            image_shape=shape,
            counts={split: len(splits[split][1]) for split in SPLITS},
            mean=tuple(float(value) for value in mean),
            std=tuple(float(value) for value in std),
            files={file: digest for file, (digest, _) in described.items()},
            sizes={file: size for file, (_, size) in described.items()},
        )
        text = manifest.to_json().encode("ascii")
        # What the parser would refuse to read must not be written.
        Manifest.parse(text, where=f"of {name!r}", remedy="nothing was written")
        files.write_bytes(staging / MANIFEST_FILE, text)
        written = files.install(
            staging, folder, keep=lambda: _is_intact(folder, manifest), known={MANIFEST_FILE, *FILES.values()}
        )
    return manifest, written


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation per channel of uint8 [N, C, H, W], in units of [0, 1].

    Sums are over integers, hence exact. A constant channel gets standard deviation 1, so that x − mean stays finite.
    """
    channels = images.shape[1]
    histogram = np.zeros((channels, 256), dtype=np.int64)
    for start in range(0, len(images), _STATISTICS_CHUNK):
        chunk = images[start : start + _STATISTICS_CHUNK]
        for channel in range(channels):
            histogram[channel] += np.bincount(chunk[:, channel].ravel(), minlength=256)
    level = np.arange(256, dtype=np.float64) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ level
    std = np.sqrt((share * (level - mean[:, None]) ** 2).sum(axis=1))
    constant = (histogram > 0).sum(axis=1) == 1
    return tuple(mean.tolist()), tuple(np.where(constant, 1.0, std).tolist())


def remedy(name: str) -> str:
    """How to mend the store of data set `name`: the last clause of messages about damage."""
    # Stores of a user's own data are called NAME-DIGEST; the part in front is what `prepare` knows.
    return f"prepare it again with `deepzero data prepare {name.partition('-')[0]} --force`"


def _reopen(path: str, name: str, digest: str) -> Split:
    store = ImageStore.open(path)
    if store.manifest.digest != digest:
        raise RequestError(f"data store {path} was replaced by another one while it was in use; start the run again")
    return store.split(name)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        if not folder.exists():
            raise RequestError(
                f"data store {folder} does not exist; `deepzero data prepare NAME` makes one, "
                "`deepzero data list` shows the names"
            ) from None
        raise RequestError(
            f"data store {folder} is damaged: {MANIFEST_FILE} cannot be read ({error.strerror}); {remedy(folder.name)}"
        ) from None
    return Manifest.parse(data, where=str(path), remedy=remedy(folder.name))


def _damage(folder: Path, manifest: Manifest, file: str, what: str) -> RequestError:
    return RequestError(f"data set {manifest.name!r} is damaged: {folder / file} {what}; {remedy(manifest.name)}")


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for file, expected in manifest.sizes.items():
        try:
            actual = (folder / file).stat().st_size
        except OSError as error:
            raise _damage(folder, manifest, file, f"cannot be found ({error.strerror})") from None
        if actual != expected:
            raise _damage(folder, manifest, file, f"has {actual} bytes, its manifest says {expected}")


def _check_hashes(folder: Path, manifest: Manifest) -> None:
    for file, expected in manifest.files.items():
        try:
            actual = files.sha256(folder / file)
        except OSError as error:
            raise _damage(folder, manifest, file, f"cannot be read ({error.strerror})") from None
        if actual != expected:
            raise _damage(folder, manifest, file, f"has sha256 {actual}, its manifest says {expected}")


def _is_intact(folder: Path, manifest: Manifest) -> bool:
    """Whether `folder` already holds exactly this store, file by file."""
    try:
        return ImageStore.open(folder, verify=True).manifest.digest == manifest.digest
    except RequestError:
        return False


def _record_batch(images: np.ndarray, labels: np.ndarray) -> pa.RecordBatch:
    flat = np.ascontiguousarray(images).reshape(-1)
    values = pa.Array.from_buffers(pa.uint8(), flat.size, [None, pa.py_buffer(flat)])
    column = pa.FixedSizeListArray.from_arrays(values, flat.size // len(images))
    schema = pa.schema(
        [pa.field("image", column.type, nullable=False), pa.field("label", pa.int64(), nullable=False)],
        metadata={"image_shape": ",".join(str(extent) for extent in images.shape[1:])},
    )
    return pa.record_batch([column, pa.array(labels.astype(np.int64, copy=False))], schema=schema)


def _map_split(folder: Path, manifest: Manifest, name: str) -> Split:
    file, count, shape = FILES[name], manifest.counts[name], manifest.image_shape
    try:
        with pa.memory_map(str(folder / file)) as source, pa.ipc.open_file(source) as reader:
            width = shape[0] * shape[1] * shape[2]
            if reader.num_record_batches != 1 or not _describes(reader.schema, width):
                raise _damage(folder, manifest, file, "does not have the columns that its manifest describes")
            batch = reader.get_batch(0)
        batch.validate()
        image_column, label_column = batch.column(0), batch.column(1)
        if batch.num_rows != count or image_column.null_count or label_column.null_count:
            raise _damage(folder, manifest, file, f"does not hold the {count} examples that its manifest describes")
        images = image_column.flatten().to_numpy(zero_copy_only=True).reshape(count, *shape)
        labels = label_column.to_numpy(zero_copy_only=True)
    # Damaged metadata also surfaces as names that are not UTF-8 and as shapes that do not fit: ValueErrors.
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise _damage(folder, manifest, file, f"is not a readable Arrow file ({reason})") from None
    if not 0 <= labels.min() <= labels.max() < manifest.num_classes:
        raise _damage(folder, manifest, file, f"holds labels outside 0 to {manifest.num_classes - 1}")
    return Split(images, labels, (str(folder.resolve()), name, manifest.digest))


def _describes(schema: pa.Schema, width: int) -> bool:
    """Whether a file's columns are images of `width` bytes and labels."""
    if schema.names != ["image", "label"]:
        return False
    image, label = schema.types
    return bool(
        pa.types.is_fixed_size_list(image)
        and image.value_type == pa.uint8()
        and image.list_size == width
        and label == pa.int64()
    )


def _check_arrays(
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str, class_names: Sequence[str]
) -> tuple[int, int, int]:
    """Refuse what cannot be stored; return the (C, H, W) that all images share."""
    if set(splits) != set(SPLITS):
        raise RequestError(f"data set {name!r} needs the splits train and test, got {', '.join(sorted(splits))}")
    if not class_names:
        raise RequestError(f"data set {name!r} has no class names; give one for each label")
    for split in SPLITS:
        images, labels = splits[split]
        where = f"the {split} split of data set {name!r}"
        if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
            raise RequestError(
                f"images of {where} have to be uint8 [N, C, H, W] and not empty, got {images.dtype} {[*images.shape]}"
            )
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            raise RequestError(
                f"labels of {where} have to be integers [{len(images)}], one for each image, "
                f"got {labels.dtype} {[*labels.shape]}"
            )
        wrong = (labels < 0) | (labels >= len(class_names))
        if wrong.any():
            at = int(np.argmax(wrong))
            raise RequestError(
                f"label {labels[at]} of example {at} in {where} is out of range: "
                f"{len(class_names)} classes have the labels 0 to {len(class_names) - 1}"
            )
    train, test = splits["train"][0].shape[1:], splits["test"][0].shape[1:]
    if train != test:
        raise RequestError(f"data set {name!r} mixes image shapes: train has {[*train]}, test has {[*test]} (C, H, W)")
    return train[0], train[1], train[2]
