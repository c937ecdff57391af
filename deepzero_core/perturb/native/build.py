"""Compile the kernels once for this machine and keep them in the user's cache folder.

The file's name is a digest of the sources, the compiler and the instruction set, so that nothing stale is ever loaded
and machines that share a home do not disturb each other. Without a compiler the engine runs on torch's own operators.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs

SWITCH = "DEEPZERO_NATIVE"
"""Environment variable: 0 keeps the engine from compiling and loading kernels."""

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_TIMEOUT_S = 300

# Of glibc's malloc.h; no larger threshold is accepted.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD, _TRIM_BYTES = 32 << 20, 1 << 30


@dataclass(frozen=True)
class Build:
    """The kernels, or why there are none; `broken` where a compiler was there and failed."""

    library: ctypes.CDLL | None
    reason: str = ""
    broken: bool = False


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be built.

    Warns:
        UserWarning: once, that a compiler failed.
    """
    return build().library


@cache
def build() -> Build:
    """Compile and load the kernels, once per process."""
    if os.environ.get(SWITCH) == "0":
        return Build(None, f"switched off by {SWITCH}=0")
    compiler = _compiler()
    if compiler is None:
        return Build(None, "no C++ compiler was found")
    try:
        kernels = ctypes.CDLL(str(_built(compiler)))
        kernels.deepzero_winograd_seconds.restype = ctypes.c_double
        _keep_freed_memory()
        return Build(kernels, f"compiled with {compiler[0]}")
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or str(error)).strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    warnings.warn(f"the engine runs on torch's operators, its kernels cannot be used: {reason}", stacklevel=3)
    return Build(None, reason, broken=True)


def _keep_freed_memory() -> None:
    """Ask the allocator to keep what a chunk frees for the next one: handed back to the system, its pages would have to
    be cleared again, which takes longer than most operators."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def _compiler() -> list[str] | None:
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    return [found] if found else None


def _built(compiler: list[str]) -> Path:
    sources = Path(__file__).parent
    folder = platformdirs.user_cache_path("deepzero") / "kernels"
    target = folder / f"{_digest(compiler, sources)}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / "kernels.so"
            _run([*compiler, *_FLAGS, str(sources / "kernels.cpp"), "-o", str(output)])
            output.replace(target)
    return target


def _digest(compiler: list[str], sources: Path) -> str:
    """`-dM` lists what the compiler predefines: its version, and the instructions that `native` stands for here."""
    digest = hashlib.sha256(repr((compiler, _FLAGS)).encode())
    digest.update(_run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]).encode())
    for source in sorted([*sources.glob("*.h"), *sources.glob("*.cpp")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S).stdout
