"""What is said of a mistake in a configuration: one sentence with the key, what is wrong and what would be right."""

import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from deepzero_core.errors import suggest

_SHOWN = 60


@dataclass(frozen=True)
class Override:
    """`--set a.b=value`, or a value that a study varies."""

    text: str
    path: tuple[str, ...]
    value: Any
    option: str = "--set"

    @property
    def where(self) -> str:
        """What a message begins with."""
        return f"{self.option} {shown(self.text, quote=False)}"

    def where_of(self, key: tuple[str, ...]) -> str:
        """`where` of a mistake at this key: what is said to a service, which may be a secret, is left out."""
        return f"{self.option} {self.text.partition('=')[0]}=…" if "settings" in key else self.where

    def concerns(self, key: tuple[str, ...]) -> bool:
        shared = min(len(key), len(self.path))
        return key[:shared] == self.path[:shared]


def sentences(
    schema: type[BaseModel], error: ValidationError, origin: str, overrides: Sequence[Override]
) -> Iterator[str]:
    for found in error.errors(include_url=False):
        path = tuple(str(part) for part in found["loc"])
        # The last override that touches the key is the one to look at.
        blamed = next((o for o in reversed(overrides) if o.concerns(path)), None)
        where = blamed.where_of(path) if blamed else origin
        yield f"{where}: {_reason(schema, path, found)}"


def reasons(schema: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """One for each mistake, without a word on where the value came from; each begins with its key."""
    for found in error.errors(include_url=False):
        yield _reason(schema, tuple(str(part) for part in found["loc"]), found)


def _reason(schema: type[BaseModel], path: tuple[str, ...], found: Any) -> str:
    key, kind, context = shown(".".join(path), quote=False), found["type"], found.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key} is not a known key; {suggest(path[-1], _valid_keys(schema, path[:-1]))}"
    if kind == "impossible":
        return f"{key}: {found['msg']}"
    if kind == "literal_error":
        hint = suggest(str(found["input"]), _choices(schema, path))
        return f"{key} cannot be {shown(found['input'])}; {hint}"
    if kind == "string_pattern_mismatch":
        allowed = "letters, digits, '.', '_' and '-', at most 100, and begin with a letter or digit"
        return f"{key} must consist of {allowed}, but is {shown(found['input'])}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} must be a mapping of keys, but is {kind_of(found['input'])}"
    if kind == "string_too_short":
        return f"{key} must not be empty"
    expected = found["msg"].removeprefix("Input should be ").removeprefix("a valid ").removeprefix("Value error, ")
    if kind in ("int_type", "int_from_float"):
        expected = "a whole number"
    elif kind == "float_type":
        expected = "a number"
    elif kind == "bool_type":
        expected = "true or false"
    elif kind == "string_type":
        expected = "text"
    elif kind in ("tuple_type", "list_type"):
        expected = "a list"
    elif kind == "path_type":
        expected = "a path"
    elif "limit" in context or any(bound in context for bound in ("gt", "ge", "lt", "le")):
        expected = found["msg"].removeprefix("Input should be ")
    return f"{key} must be {expected}, but is {shown(found['input'])}"


def _valid_keys(schema: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    model = model_of(_annotation(schema, path))
    return list(model.model_fields) if model is not None else []


def _choices(schema: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    annotation = _annotation(schema, path)
    if is_kind(annotation, tuple):
        annotation = typing.get_args(annotation)[0]
    return [str(choice) for choice in typing.get_args(annotation)]


def _annotation(schema: type[BaseModel], path: tuple[str, ...]) -> Any:
    annotation: Any = schema
    for part in path:
        model = model_of(annotation)
        if model is None:
            break
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
    return annotation


def model_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def is_kind(annotation: Any, kind: type) -> bool:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return any(option is kind or typing.get_origin(option) is kind for option in options)


def kind_of(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    return f"the {'text' if isinstance(value, str) else 'number'} {shown(value)}"


def shown(value: Any, *, quote: bool = True) -> str:
    """One line of at most _SHOWN characters, control characters escaped."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)[1:-1] if not quote else repr(value)
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    else:
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
