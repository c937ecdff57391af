"""The lines that hold the project together: who may import whom, what may stand in a file, how long one may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.catalogue import ENTRYPOINTS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("deepzero_core", "configs", "infra", "simulators", "tasks", "flows")

# Dependencies point one way; whoever is not listed may not be imported. `configs` reads the errors of the core only.
MAY_IMPORT = {
    "deepzero_core": set(),
    "configs": {"deepzero_core.errors"},
    "infra": {"deepzero_core", "configs"},
    "simulators": {"deepzero_core"},
    "tasks": {"deepzero_core", "configs", "infra", "simulators"},
    "flows": {"deepzero_core", "configs", "infra", "simulators", "tasks"},
}
FORBIDDEN_IN_CORE = {"prefect", "prefect_dask", "mlflow", "dask", "distributed", "logging", "rich", "typer"}
MAX_LINES = 400


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path, source: str | None = None) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(ROOT).parent.parts
                base = package[: len(package) - node.level + 1]
                yield node.lineno, ".".join((*base, *(node.module or "").split("."))).rstrip(".")
            else:
                # `from package import module` imports package.module as well.
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(path: Path, source: str | None = None) -> list[str]:
    package = path.relative_to(ROOT).parts[0]
    found = []
    for line, name in imports(path, source):
        top = name.partition(".")[0]
        allowed = any(name == entry or name.startswith(f"{entry}.") for entry in MAY_IMPORT[package])
        if (top in PACKAGES and top != package and not allowed) or (
            package == "deepzero_core" and top in FORBIDDEN_IN_CORE
        ):
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("package", [package for package in PACKAGES if (ROOT / package).is_dir()])
def test_dependencies_point_one_way(package: str) -> None:
    assert [line for path in modules() if path.relative_to(ROOT).parts[0] == package for line in violations(path)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("deepzero_core/a.py", "import mlflow"),
        ("deepzero_core/a.py", "def f():\n    from prefect.client import get_client"),
        ("deepzero_core/a.py", "import configs"),
        ("deepzero_core/data/a.py", "from ...configs import load"),
        ("configs/a.py", "from deepzero_core import cge"),
        ("infra/a.py", "import tasks.train"),
        ("tasks/a.py", "from flows import run"),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str) -> None:
    assert len(violations(ROOT / path, source)) == 1


def test_the_core_is_imported_without_orchestration() -> None:
    code = (
        "import importlib, pkgutil, sys, deepzero_core\n"
        "for module in pkgutil.walk_packages(deepzero_core.__path__, 'deepzero_core.'):\n"
        "    importlib.import_module(module.name)\n"
        f"print(sorted({FORBIDDEN_IN_CORE - {'logging', 'rich', 'typer'}!r} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("flow", ENTRYPOINTS)
def test_what_a_run_does_is_planned_before_prefect_reads_its_settings(flow: str, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, configs\nfrom flows.run import PLANS\n"
        f"experiment = configs.load('smoke', flow={flow!r})\n"
        f"PLANS[type(experiment)]({flow!r}, experiment, pathlib.Path({str(tmp_path)!r}))\n"
        "print('prefect' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, "a file that needs a map is two files"


def repository_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


def test_no_file_names_a_place_of_one_machine() -> None:
    # Spelt in pieces, so that this file does not find itself.
    places = "|".join(("work/", "root/", "home/[a-z]", "Users/[a-zA-Z]", "opt/pypi"))
    pattern = re.compile(rf"(?<![\w.$}}])/(?:{places})")
    found = []
    for path in repository_files():
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or a data file
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(text.splitlines(), start=1)
            if pattern.search(line)
        ]
    assert found == []
