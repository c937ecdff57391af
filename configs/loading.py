"""Reading, overriding, validating and writing experiments.

Whatever is wrong with a configuration, its text or an override becomes a RequestError with one sentence per mistake.
"""

import importlib.resources
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from configs import yaml_text
from configs.schema import Experiment
from deepzero_core.errors import RequestError, suggest

_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 4 * yaml_text.MAX_CHARACTERS
_SHOWN = 60


@dataclass(frozen=True)
class _Override:
    text: str
    path: tuple[str, ...]
    value: Any

    def concerns(self, key: tuple[str, ...]) -> bool:
        shared = min(len(key), len(self.path))
        return key[:shared] == self.path[:shared]


def load(name_or_path: str, overrides: Sequence[str] = (), *, flow: str | None = None) -> Experiment:
    """The experiment of a file or preset with `a.b=c` overrides applied in their order.

    name_or_path: an existing file, else a preset of the flow, else a preset.
    RequestError: no such file or preset, unreadable text, or a mistake in the configuration or an override.
    """
    path = _existing_file(name_or_path)
    if path is not None:
        return loads(_read(path), overrides, origin=str(path), name=path.stem)
    found = _preset_files(flow)
    if name_or_path not in found:
        raise RequestError(_nothing_called(name_or_path, found))
    text = found[name_or_path].read_text(encoding="utf-8")
    return loads(text, overrides, origin=f"preset {name_or_path!r}", name=name_or_path)


def loads(
    text: str, overrides: Sequence[str] = (), *, origin: str = "configuration", name: str | None = None
) -> Experiment:
    """The experiment of a YAML text, as `load`.

    origin: what messages call the text. name: the experiment's, where the text gives none; ignored when not valid.
    """
    try:
        data = yaml_text.parse(text)
    except yaml_text.YamlError as error:
        raise RequestError(f"{origin}: {error}") from error
    if data is None:
        raise RequestError(f"{origin}: the configuration is empty; `deepzero config demo` prints one to start from")
    if not isinstance(data, dict):
        raise RequestError(f"{origin}: a configuration is a mapping of keys to values, not {_kind(data)}")
    parsed = [_parse_override(override) for override in overrides]
    for override in parsed:
        _apply(data, override)
    if name is not None and "name" not in data and _is_valid_name(name):
        data["name"] = name
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise RequestError("\n".join(_sentences(error, origin, parsed))) from error
    except RecursionError as error:
        raise RequestError(f"{origin}: nested too deeply") from error


def dump(experiment: Experiment) -> str:
    """The resolved configuration as YAML; loading it gives an equal experiment."""
    return yaml_text.write(experiment.model_dump(mode="json"))


def presets(flow: str | None = None) -> tuple[str, ...]:
    """Names of the presets of a flow and of those for all flows."""
    return tuple(sorted(_preset_files(flow)))


# Files and presets


def _existing_file(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        looks_like_path = "/" in name or "\\" in name or path.suffix in _SUFFIXES
        is_folder = looks_like_path and path.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a null character, an unknown ~user
        raise RequestError(f"{_shown(name)} can be neither a configuration file nor a preset") from None
    if is_folder:
        raise RequestError(f"{name} is a folder; a configuration is a YAML file in it, or the name of a preset")
    if looks_like_path:
        raise RequestError(f"there is no configuration file {name}; presets are: {', '.join(presets())}")
    return None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > _MAX_BYTES:
        raise RequestError(f"{path} is larger than {_MAX_BYTES // 2**20} MiB, which no configuration is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}); a configuration is a YAML file") from error


def _preset_files(flow: str | None) -> dict[str, Any]:
    root = importlib.resources.files("configs")
    folders = [root] + ([root / flow] if flow is not None and flow.isidentifier() and (root / flow).is_dir() else [])
    # The flow's own presets come last and win.
    return {
        file.name.removesuffix(".yaml"): file
        for folder in folders
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    }


def _nothing_called(name: str, valid: typing.Iterable[str]) -> str:
    if not name:
        return f"the name of a preset or file is empty; {suggest(name, valid)}"
    return f"there is neither a file nor a preset called {_shown(name)}; {suggest(name, valid)}"


# Overrides


def _parse_override(text: str) -> _Override:
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals:
        raise RequestError(f"--set {_shown(text, quote=False)}: there is no '='; write --set {_example(path)}=VALUE")
    if not all(path):
        raise RequestError(f"--set {_shown(text, quote=False)}: the key before '=' must be names joined by dots, a.b=c")
    try:
        return _Override(text, path, yaml_text.parse(value))
    except yaml_text.YamlError as error:
        raise RequestError(f"--set {_shown(text, quote=False)}: the value is refused: {error}") from error


def _example(path: tuple[str, ...]) -> str:
    return ".".join(path) if all(path) else "training.epochs"


def _apply(data: dict[str, Any], override: _Override) -> None:
    where = f"--set {_shown(override.text, quote=False)}"
    annotation: Any = Experiment
    for depth, part in enumerate(override.path):
        above = ".".join(override.path[:depth])
        model = _model_of(annotation)
        if model is not None:
            if part not in model.model_fields:
                key = ".".join(override.path[: depth + 1])
                raise RequestError(f"{where}: {key} is not a known key; {suggest(part, model.model_fields)}")
            annotation = model.model_fields[part].annotation
        elif _is_kind(annotation, tuple):
            raise RequestError(f"{where}: {above} is a list, which is set as a whole: --set {above}=[…]")
        elif annotation is not Any and not _is_kind(annotation, dict):
            raise RequestError(
                f"{where}: {above} is a single value and has no keys below it; write --set {above}=VALUE"
            )
        else:
            annotation = Any  # free-form arguments may be nested as their receiver likes
    target: Any = data
    for depth, part in enumerate(override.path[:-1]):
        # A section left empty in the file (`training:`) is null, and an override is a way to fill it.
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            above = ".".join(override.path[: depth + 1])
            raise RequestError(f"{where}: {above} is {_kind(target)} in the configuration and has no keys below it")
    target[override.path[-1]] = override.value


# Messages


def _sentences(error: ValidationError, origin: str, overrides: Sequence[_Override]) -> Iterator[str]:
    for found in error.errors(include_url=False):
        path = tuple(str(part) for part in found["loc"])
        # The last override that touches the key is the one to look at.
        blamed = next((o for o in reversed(overrides) if o.concerns(path)), None)
        where = f"--set {_shown(blamed.text, quote=False)}" if blamed else origin
        yield f"{where}: {_reason(path, found)}"


def _reason(path: tuple[str, ...], found: Any) -> str:
    key, kind, context = _shown(".".join(path), quote=False), found["type"], found.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{key} is not a known key; {suggest(path[-1], _valid_keys(path[:-1]))}"
    if kind == "impossible":
        return f"{key}: {found['msg']}"
    if kind == "literal_error":
        hint = suggest(str(found["input"]), _choices(path))
        return f"{key} cannot be {_shown(found['input'])}; {hint}"
    if kind == "string_pattern_mismatch":
        allowed = "letters, digits, '.', '_' and '-', at most 100, and begin with a letter or digit"
        return f"{key} must consist of {allowed}, but is {_shown(found['input'])}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} must be a mapping of keys, but is {_kind(found['input'])}"
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
    return f"{key} must be {expected}, but is {_shown(found['input'])}"


def _valid_keys(path: tuple[str, ...]) -> list[str]:
    model = _model_of(_annotation(path))
    return list(model.model_fields) if model is not None else []


def _choices(path: tuple[str, ...]) -> list[str]:
    annotation = _annotation(path)
    if _is_kind(annotation, tuple):
        annotation = typing.get_args(annotation)[0]
    return [str(choice) for choice in typing.get_args(annotation)]


def _annotation(path: tuple[str, ...]) -> Any:
    annotation: Any = Experiment
    for part in path:
        model = _model_of(annotation)
        if model is None:
            break
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
    return annotation


def _model_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _is_kind(annotation: Any, kind: type) -> bool:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return any(option is kind or typing.get_origin(option) is kind for option in options)


def _is_valid_name(name: str) -> bool:
    try:
        Experiment(name=name)
    except ValidationError:
        return False
    return True


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    return f"the {'text' if isinstance(value, str) else 'number'} {_shown(value)}"


def _shown(value: Any, *, quote: bool = True) -> str:
    """One line of at most _SHOWN characters, control characters escaped."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)[1:-1] if not quote else repr(value)
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    else:
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
