"""A user's own modules on workers that share no disk with this process.

A configuration names code as "package.module:callable". Where such a package is not installed (it lies in the working
directory, on PYTHONPATH, or is installed for editing) its files, and those of own packages that it imports, travel to
every worker as an archive, which a plugin unpacks before anything is built. What is installed is left to the workers'
own environments.
"""

import ast
import hashlib
import importlib
import io
import site
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distributed import Client, Worker, WorkerPlugin

from configs.checks import CALLABLE
from deepzero_core.errors import RequestError
from infra.plugins import name_for, withdraw

MAX_BYTES = 32 << 20
_OURS = {"deepzero_core", "simulators", "configs", "infra", "tasks", "flows"}
_ALWAYS_SAME_TIME = (1980, 1, 1, 0, 0, 0)


@contextmanager
def own_code(client: Client, mentions: Any) -> Iterator[None]:
    """Own packages of every callable in `mentions` can be imported on all workers within the block, late ones too.

    RequestError: a package with more than 32 MiB of files.
    """
    archives = {name: archive(name) for name in own_packages(mentions)}
    if not archives:
        yield
        return
    name = name_for(client, "own-code")
    client.register_plugin(OwnCode(name, archives))
    try:
        yield
    finally:
        withdraw(client, name)


def own_packages(mentions: Any) -> set[str]:
    """Top-level names of own packages behind the callables in plain data, with all that they import."""
    found: set[str] = set()
    waiting = {text.partition(":")[0].partition(".")[0] for text in _texts(mentions) if CALLABLE.fullmatch(text)}
    while waiting:
        name = waiting.pop()
        if name not in found and _is_own(name):
            found.add(name)
            waiting |= {imported for path in _sources(name) for imported in _imports(path)}
    return found


def archive(name: str) -> bytes:
    """A zip archive of a top-level module or package; the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        size = 0
        for base, path in _files(name):
            size += path.stat().st_size
            if size > MAX_BYTES:
                raise RequestError(
                    f"the package {name!r} has more than {MAX_BYTES >> 20} MiB of files, which do not travel to "
                    "workers with every run: install it on them (pip install), or keep data out of it"
                )
            entry = zipfile.ZipInfo(path.relative_to(base).as_posix(), _ALWAYS_SAME_TIME)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, path.read_bytes())
    return buffer.getvalue()


class OwnCode(WorkerPlugin):
    """Archives by top-level name, unpacked among the worker's own files and put in front of what it can import."""

    def __init__(self, name: str, archives: Mapping[str, bytes]) -> None:
        self.name, self._archives = name, dict(archives)
        content = (name.encode() + b"\0" + archives[name] for name in sorted(archives))
        self._digest = hashlib.sha256(b"".join(content)).hexdigest()

    def setup(self, worker: Worker) -> None:
        # Not shared with other workers of the host, as files are: nobody else has written what is imported from here.
        self._folder = Path(worker.local_directory) / "deepzero-code" / self._digest
        for data in self._archives.values() if not self._folder.exists() else ():
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                file.extractall(self._folder)
        sys.path.insert(0, str(self._folder))
        importlib.invalidate_caches()
        for name, module in list(sys.modules.items()):
            elsewhere = not str(getattr(module, "__file__", None) or "").startswith(str(self._folder))
            if elsewhere and name.partition(".")[0] in self._archives:
                del sys.modules[name]  # of an earlier run, or of the worker's own environment

    def teardown(self, worker: Worker) -> None:
        if str(self._folder) in sys.path:
            sys.path.remove(str(self._folder))


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _texts(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _texts(value)


def _places(name: str) -> list[Path]:
    """The file of a top-level module, or the folders of a package; none where there is no such code in files."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(place).resolve() for place in spec.submodule_search_locations]
    return [Path(spec.origin).resolve()] if spec.has_location and spec.origin else []


def _is_own(name: str) -> bool:
    libraries = [path for key, path in sysconfig.get_paths().items() if key.endswith("lib")]
    installed = [Path(path).resolve() for path in (*libraries, *site.getsitepackages(), site.getusersitepackages())]
    places = _places(name)
    return (
        name not in _OURS
        and name not in sys.stdlib_module_names
        and bool(places)
        and not any(place.is_relative_to(folder) for place in places for folder in installed)
    )


def _files(name: str) -> Iterator[tuple[Path, Path]]:
    """(folder that has to be importable, file) of all that belongs to a top-level name."""
    for place in _places(name):
        if place.is_file():
            yield place.parent, place
            continue
        # A folder without __init__.py may be anything, such as the working directory with its data: code alone.
        pattern = "*" if (place / "__init__.py").exists() else "*.py"
        for path in sorted(place.rglob(pattern)):
            hidden = any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(place).parts)
            if path.is_file() and not hidden:
                yield place.parent, path


def _sources(name: str) -> Iterator[Path]:
    yield from (path for _, path in _files(name) if path.suffix == ".py")


def _imports(path: Path) -> Iterator[str]:
    """Top-level names of a source file's imports."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # it cannot be imported either, and that is said where it is
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
