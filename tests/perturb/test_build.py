"""How the kernels are compiled, kept and found again; and what happens where they cannot be."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepzero_core import cge, reference
from deepzero_core.perturb.native import gain, program
from deepzero_core.perturb.native.build import SWITCH, build, library

COMPILER = build().library is not None
ALONE = "from deepzero_core.perturb.native.build import build; print(build().reason)"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and no kernels loaded yet."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(SWITCH, raising=False)
    for kept in (build, gain.bfloat16_pays):
        kept.cache_clear()
    yield tmp_path / "deepzero" / "kernels"
    monkeypatch.undo()
    for kept in (build, gain.bfloat16_pays):
        kept.cache_clear()


def assert_works() -> None:
    """The engine is right, with kernels or without."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    problem = (module, torch.randn(17, 1, 4, 4), torch.randint(2, (17,)), F.cross_entropy)
    for name, gradient in cge(*problem, mu=0.05).gradients.items():
        torch.testing.assert_close(gradient, reference.cge(*problem, mu=0.05).gradients[name], rtol=1e-3, atol=1e-4)


def test_without_a_compiler_torch_does_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    assert (build().reason, build().broken) == ("no C++ compiler was found", False)
    assert not program.has_bfloat16()
    assert_works()
    assert not cache.exists(), "nothing is created for nothing"


def test_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert library() is None and build().reason == "switched off by DEEPZERO_NATIVE=0"
    assert_works()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("false", "non-zero exit status"),
        ("no-such-compiler -O2", "no-such-compiler"),
        ("g++ --no-such-option", "no-such-option"),
        ("g++ -fsyntax-only", "No such file"),
    ],
)
def test_a_compiler_that_fails_is_named_once(
    compiler: str, reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler.startswith("g++") and not COMPILER:
        pytest.skip("no g++")
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match="runs on torch's operators") as said:
        assert library() is None
    assert len(said) == 1 and said[0].category is UserWarning and reason in str(said[0].message)
    assert build().broken and reason in build().reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_works()
    assert not list(cache.glob("*")), "no half of a file stays behind"


def test_a_folder_that_cannot_be_written_is_named(cache: Path) -> None:
    if not COMPILER:
        pytest.skip("no compiler")
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be used"):
        assert library() is None
    assert_works()


def compiled(folder: Path) -> list[Path]:
    return sorted((folder / "deepzero" / "kernels").iterdir())


@pytest.mark.skipif(not COMPILER or sys.platform != "linux", reason="needs a compiler, and Linux to move the cache")
def test_processes_share_what_one_of_them_compiled(tmp_path: Path) -> None:
    """Two at once leave one whole file; a third loads it and compiles nothing."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", ALONE]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all("compiled with" in process.communicate(timeout=250)[0] for process in both)
    (found,) = compiled(tmp_path)
    assert found.suffix == ".so"
    before = found.stat().st_mtime_ns
    third = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert "compiled with" in third.stdout
    assert [path.stat().st_mtime_ns for path in compiled(tmp_path)] == [before]


@pytest.mark.skipif(not program.has_bfloat16(), reason="this machine has no kernels in bfloat16")
def test_what_bfloat16_gains_is_measured_once(cache: Path) -> None:
    found = gain.gain()
    (kept,) = cache.glob("*.bfloat16")
    assert 0.1 < found < 10 and float(kept.read_text()) == found
    for written, pays in (("1.2\n", True), ("0.8\n", False)):
        kept.write_text(written)
        gain.bfloat16_pays.cache_clear()
        assert gain.bfloat16_pays() is pays
    assert gain.gain() == 0.8, "it is not measured again"


def test_without_kernels_bfloat16_gains_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert not gain.bfloat16_pays()
