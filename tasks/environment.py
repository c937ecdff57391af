"""What a run ran on and with: versions, commit, processor. No names of users, folders or machines."""

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("deepzero", "torch", "prefect", "mlflow", "dask", "pyarrow")
_UNKNOWN = "unknown"
_ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """Facts that may explain why two runs differ, by name; what cannot be found out is "unknown".

    commit, dirty    of the checkout that this package runs from; "unknown" where it is installed
    deepzero, torch, prefect, mlflow, dask, pyarrow, python    versions
    system, processor, cores, memory, cuda    hardware and operating system
    deepzero.host    machine, as `host()` disguises it
    """
    commit, dirty = git_state(_ROOT)
    return {
        "commit": commit,
        "dirty": dirty,
        **{name: version(name) for name in PACKAGES},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        "processor": _processor(),
        "cores": str(os.cpu_count() or _UNKNOWN),
        "memory": _memory(),
        "cuda": _cuda(),
        "deepzero.host": host(),
    }


def host() -> str:
    """Twelve hex digits that tell machines apart without naming them."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def version(package: str) -> str:
    """Installed version of a distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _UNKNOWN


def git_state(folder: Path) -> tuple[str, str]:
    """(commit, "true" | "false": differs from it) when `folder` is the top of a checkout, else "unknown" twice.

    A package inside some other project's checkout, say in its virtual environment, is not of that project's commit.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.resolve():
        return _UNKNOWN, _UNKNOWN
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    return commit or _UNKNOWN, _UNKNOWN if changes is None else str(bool(changes)).lower()


def _git(folder: Path, *arguments: str) -> str | None:
    # GIT_DIR and its like, as hooks set them, point to another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    variables["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            env=variables,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _memory() -> str:
    import psutil

    return f"{psutil.virtual_memory().total / 2**30:.1f} GiB"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models and models[0]) or platform.processor() or platform.machine() or _UNKNOWN


@cache
def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"
