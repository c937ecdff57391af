"""What a store says about itself: one JSON file beside the Arrow files.

The parser trusts nothing: whatever the bytes are, the outcome is a valid `Manifest` or a `RequestError`.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, NoReturn

from deepzero_core.errors import RequestError, suggest

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "test")
FILES = {split: f"{split}.arrow" for split in SPLITS}

# Arrow lengths and file sizes are signed 64-bit; anything beyond is damage, not data.
_LARGEST = 2**63 - 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _FieldError(ValueError):
    """The reason why a field is refused; becomes the end of a RequestError sentence."""


@dataclass(frozen=True)
class Manifest:
    """Description of one image store.

    Attributes:
        schema_version: layout of the store; readers refuse others than `SCHEMA_VERSION`.
        name: data set name as in `deepzero data list`.
        source: where the images came from, in words.
        licence: terms of the data, in words.
        class_names: one per label, in the order of the labels 0 … K−1.
        image_shape: (C, H, W) of every image.
        counts: examples per split, {"train": n, "test": n}.
        mean, std: per channel, in units of [0, 1], over the train split.
        files: {file name: sha256 in hex}.
        sizes: {file name: bytes}; lets a reader notice truncation without hashing.
    """

    schema_version: int
    name: str
    source: str
    licence: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    counts: Mapping[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: Mapping[str, str]
    sizes: Mapping[str, int]

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @cached_property
    def digest(self) -> str:
        """sha256, in hex, of the canonical JSON of all fields: identifies content and description of the store."""
        return digest_of(asdict(self))

    def to_json(self) -> str:
        """The manifest file's text, with the digest that lets the parser notice a changed field."""
        return json.dumps({**asdict(self), "digest": self.digest}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, data: bytes, *, where: str, remedy: str) -> "Manifest":
        """Read a manifest file.

        Args:
            data: the bytes of the file.
            where: path of the file, for messages.
            remedy: how to mend a damaged store, the last clause of the messages.

        Raises:
            RequestError: not JSON, another schema version, a field missing, unknown or impossible, or a digest that
                does not fit the fields.
        """
        try:
            return _checked(cls, _decode(data))
        except _FieldError as error:
            raise RequestError(f"manifest {where} cannot be used: {error}; {remedy}") from None


def digest_of(payload: Mapping[str, Any]) -> str:
    """sha256, in hex, of the canonical JSON of `payload`: sorted keys, no spaces, ASCII, no NaN."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _decode(data: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _FieldError("a key occurs twice")
        return result

    def no_constant(token: str) -> NoReturn:
        raise _FieldError(f"{token} is not JSON")

    try:
        payload = json.loads(data, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except _FieldError:
        raise
    except RecursionError:
        raise _FieldError("it is nested too deeply") from None
    # JSONDecodeError, UnicodeDecodeError and the refusal of numbers with thousands of digits are all ValueErrors.
    except ValueError as error:
        raise _FieldError(f"it is not JSON ({error})") from None
    if not isinstance(payload, dict):
        raise _FieldError("it is not a JSON object")
    return payload


def _checked(cls: type[Manifest], payload: dict[str, Any]) -> Manifest:
    version = payload.get("schema_version")
    if not _is_int(version, 0):
        raise _FieldError("'schema_version' is missing or not a number")
    if version != SCHEMA_VERSION:
        raise _FieldError(f"it has schema version {version}, this deepzero reads version {SCHEMA_VERSION}")

    names = {field.name for field in fields(cls)}
    for key in payload:
        if key not in names | {"digest"}:
            raise _FieldError(f"unknown key {key!r}, {suggest(key, names)}")
    for key in (*sorted(names), "digest"):
        if key not in payload:
            raise _FieldError(f"{key!r} is missing")

    counts = _mapping(payload, "counts", SPLITS, lambda v: _is_int(v, 1), "a positive number of examples")
    files = _mapping(payload, "files", FILES.values(), _is_sha256, "a sha256 in hex")
    sizes = _mapping(payload, "sizes", FILES.values(), lambda v: _is_int(v, 1), "a positive number of bytes")
    class_names = _sequence(payload, "class_names", lambda v: isinstance(v, str) and bool(v), "non-empty strings")
    if len(set(class_names)) != len(class_names):
        raise _FieldError("'class_names' holds a name twice")
    shape = _sequence(payload, "image_shape", lambda v: _is_int(v, 1), "positive numbers")
    if len(shape) != 3:
        raise _FieldError("'image_shape' has to be [channels, height, width]")
    mean = _sequence(payload, "mean", lambda v: _is_number(v) and 0 <= v <= 1, "numbers in [0, 1]")
    std = _sequence(payload, "std", lambda v: _is_number(v) and 0 < v <= 1, "numbers in (0, 1]")
    if not len(mean) == len(std) == shape[0]:
        raise _FieldError(f"'mean' and 'std' need one number for each of the {shape[0]} channels")

    manifest = cls(
        schema_version=version,
        name=_text(payload, "name"),
        source=_text(payload, "source"),
        licence=_text(payload, "licence"),
        class_names=class_names,
        image_shape=(shape[0], shape[1], shape[2]),
        counts=counts,
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        files=files,
        sizes=sizes,
    )
    if payload["digest"] != manifest.digest:
        raise _FieldError("its digest does not fit its fields, so it was changed or damaged")
    return manifest


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _text(payload: dict[str, Any], key: str) -> str:
    value = payload[key]
    if not isinstance(value, str) or not value:
        raise _FieldError(f"{key!r} has to be a non-empty string")
    return value


def _sequence(payload: dict[str, Any], key: str, valid: Callable[[Any], bool], what: str) -> tuple[Any, ...]:
    value = payload[key]
    if not isinstance(value, list) or not value or not all(valid(item) for item in value):
        raise _FieldError(f"{key!r} has to be a non-empty list of {what}")
    return tuple(value)


def _mapping(payload: dict[str, Any], key: str, keys: Any, valid: Callable[[Any], bool], what: str) -> dict[str, Any]:
    value = payload[key]
    if not isinstance(value, dict) or set(value) != set(keys) or not all(valid(item) for item in value.values()):
        raise _FieldError(f"{key!r} has to give {what} for each of {', '.join(keys)}")
    return value
