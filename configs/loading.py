"""Reading, overriding, validating and writing experiments: what a flow is told, in the schema of that flow.

Whatever is wrong with a configuration, its text or an override becomes a RequestError with one sentence per mistake.
"""

import copy
import importlib.resources
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs import yaml_text
from configs.defence import Defence
from configs.messages import Override, is_kind, kind_of, model_of, sentences, shown
from configs.schema import Experiment, Section
from configs.solver_loop import SolverLoop
from configs.study import Study
from deepzero_core.errors import RequestError, suggest

SCHEMAS: dict[str, type[Section]] = {
    "classify": Experiment,
    "pipeline": Experiment,
    "defend": Defence,
    "solver-loop": SolverLoop,
    "study": Study,
}
"""By flow: what it is told. Without a flow an Experiment is meant."""

_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 4 * yaml_text.MAX_CHARACTERS


def load(name_or_path: str, overrides: Sequence[str] = (), *, flow: str | None = None) -> Any:
    """The experiment of a file or preset with `a.b=c` overrides applied in their order, in the flow's schema.

    name_or_path: an existing file, else a preset of the flow.
    RequestError: no such file or preset, unreadable text, or a mistake in the configuration or an override.
    """
    text, origin, name = _found(name_or_path, flow)
    return loads(text, overrides, origin=origin, name=name, flow=flow)


def loads(
    text: str,
    overrides: Sequence[str] = (),
    *,
    origin: str = "configuration",
    name: str | None = None,
    flow: str | None = None,
) -> Any:
    """The experiment of a YAML text, as `load`.

    origin: what messages call the text. name: the experiment's, where the text gives none; ignored when not valid.
    """
    parsed = [_parse_override(override) for override in overrides]
    return _validated(_mapping(text, origin), parsed, origin, name, flow)


def resolve(base: str | Mapping[str, Any], values: Mapping[str, Any], *, flow: str) -> Any:
    """The experiment of a file, a preset or a mapping with `values` set by dotted key; RequestError as `load`."""
    if isinstance(base, str):
        text, origin, name = _found(base, flow)
        data = _mapping(text, origin)
    else:
        data, origin, name = copy.deepcopy(dict(base)), "base", None
    given = [
        Override(f"{key}={shown(value, quote=False)}", tuple(key.split(".")), copy.deepcopy(value), option="vary")
        for key, value in values.items()
    ]
    return _validated(data, given, origin, name, flow)


def mapping_of(path: str) -> dict[str, Any]:
    """What a configuration file says, as plain data; RequestError where it says nothing that can be read."""
    text, origin, _ = _found(path, None)
    return _mapping(text, origin)


def _found(name_or_path: str, flow: str | None) -> tuple[str, str, str]:
    """Text of a file or preset, what messages call it, and the name of an experiment that has none."""
    path = _existing_file(name_or_path)
    if path is not None:
        return _read(path), str(path), path.stem
    found = _preset_files(flow)
    if name_or_path not in found:
        raise RequestError(_nothing_called(name_or_path, found, flow))
    return found[name_or_path].read_text(encoding="utf-8"), f"preset {name_or_path!r}", name_or_path


def _mapping(text: str, origin: str) -> dict[str, Any]:
    try:
        data = yaml_text.parse(text)
    except yaml_text.YamlError as error:
        raise RequestError(f"{origin}: {error}") from error
    if data is None:
        raise RequestError(f"{origin}: the configuration is empty; `deepzero config demo` prints one to start from")
    if not isinstance(data, dict):
        raise RequestError(f"{origin}: a configuration is a mapping of keys to values, not {kind_of(data)}")
    return data


def _validated(
    data: dict[str, Any], overrides: Sequence[Override], origin: str, name: str | None, flow: str | None
) -> Any:
    schema = Experiment if flow is None else SCHEMAS[flow]
    for override in overrides:
        _apply(schema, data, override)
    if name is not None and "name" not in data and _is_valid_name(name):
        data["name"] = name
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise RequestError("\n".join(sentences(schema, error, origin, overrides))) from error
    except RecursionError as error:
        raise RequestError(f"{origin}: nested too deeply") from error


def dump(experiment: Section) -> str:
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
        raise RequestError(f"{shown(name)} can be neither a configuration file nor a preset") from None
    if is_folder:
        raise RequestError(
            f"{shown(name, quote=False)} is a folder; a configuration is a YAML file in it, or the name of a preset"
        )
    if looks_like_path:
        raise RequestError(
            f"there is no configuration file {shown(name, quote=False)}; presets are: {', '.join(presets())}"
        )
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
    """Experiments lie beside the code; of a flow with a schema of its own, in its folder, dashes as underscores."""
    root = importlib.resources.files("configs")
    folder = root if flow is None or SCHEMAS[flow] is Experiment else root / flow.replace("-", "_")
    return {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}


def _nothing_called(name: str, valid: typing.Iterable[str], flow: str | None) -> str:
    of_flow = "" if flow is None else f" for {flow}"
    if not name:
        return f"the name of a preset or file is empty; {suggest(name, valid)}"
    return f"there is neither a file nor a preset{of_flow} called {shown(name)}; {suggest(name, valid)}"


# Overrides


def _parse_override(text: str) -> Override:
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals:
        raise RequestError(f"--set {shown(text, quote=False)}: there is no '='; write --set {_example(path)}=VALUE")
    if not all(path):
        raise RequestError(f"--set {shown(text, quote=False)}: the key before '=' must be names joined by dots, a.b=c")
    try:
        return Override(text, path, yaml_text.parse(value))
    except yaml_text.YamlError as error:
        raise RequestError(f"--set {shown(text, quote=False)}: the value is refused: {error}") from error


def _example(path: tuple[str, ...]) -> str:
    return ".".join(path) if all(path) else "training.epochs"


def _apply(schema: type[Section], data: dict[str, Any], override: Override) -> None:
    where = override.where
    annotation: Any = schema
    for depth, part in enumerate(override.path):
        above = ".".join(override.path[:depth])
        model = model_of(annotation)
        if model is not None:
            if part not in model.model_fields:
                key = ".".join(override.path[: depth + 1])
                raise RequestError(f"{where}: {key} is not a known key; {suggest(part, model.model_fields)}")
            annotation = model.model_fields[part].annotation
        elif is_kind(annotation, tuple):
            raise RequestError(f"{where}: {above} is a list, which is set as a whole: --set {above}=[…]")
        elif annotation is not Any and not is_kind(annotation, dict):
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
            raise RequestError(f"{where}: {above} is {kind_of(target)} in the configuration and has no keys below it")
    target[override.path[-1]] = override.value


def _is_valid_name(name: str) -> bool:
    try:
        Experiment(name=name)
    except ValidationError:
        return False
    return True
