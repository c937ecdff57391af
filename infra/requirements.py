"""The installed packages against what they require of each other and against the versions tested together."""

import tomllib
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

DISTRIBUTION = "deepzero"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Requirements:
    """examined: how many packages were looked at.

    broken: package -> why it does not do. untested: package -> (installed version, version tested together).
    """

    examined: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    untested: dict[str, tuple[str, str]] = field(default_factory=dict)


def examine_requirements(root: Path = _ROOT) -> Requirements:
    """Follow the requirements of this package through all installed ones."""
    outcome = Requirements()
    pins = _pins(root / "constraints.txt")
    queue = [(DISTRIBUTION, requirement) for requirement in _direct(root)]
    seen: set[tuple[str, frozenset[str]]] = set()
    versions: dict[str, str] = {}
    while queue:
        wanted_by, requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            outcome.broken[name] = f"missing, but {wanted_by} needs {requirement}"
            continue
        versions[name] = version
        try:
            suits = requirement.specifier.contains(version, prereleases=True)
        except InvalidVersion:
            suits = False
        if not suits:
            outcome.broken[name] = f"{version} is installed, but {wanted_by} needs {requirement}"
        key = (name, frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            queue += [(name, below) for below in _required_by(requirement)]
    outcome.examined = len(versions)
    for package, version in versions.items():
        # A build tag (2.13.0+cpu) is another build of the same version.
        if package in pins and version.partition("+")[0] != pins[package] and package not in outcome.broken:
            outcome.untested[package] = (version, pins[package])
    return outcome


def _direct(root: Path) -> list[Requirement]:
    # The project file is newer than what was installed of it, and is there when nothing was installed.
    project = root / "pyproject.toml"
    if project.is_file():
        texts = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        return [Requirement(text) for text in texts]
    return _applicable(metadata.requires(DISTRIBUTION) or [], frozenset())


def _required_by(requirement: Requirement) -> list[Requirement]:
    return _applicable(metadata.requires(requirement.name) or [], frozenset(requirement.extras))


def _applicable(texts: list[str], extras: frozenset[str]) -> list[Requirement]:
    found = []
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # a foreign package's metadata; its author's matter, and pip installed it
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            found.append(requirement)
    return found


def _pins(file: Path) -> dict[str, str]:
    """name -> version of a constraints file; empty when there is none, as in a wheel."""
    if not file.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
