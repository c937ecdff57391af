"""The engine with its kernels and without."""

from collections.abc import Iterator

import pytest

from deepzero_core.perturb.native.build import SWITCH, build


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels switched off, as `DEEPZERO_NATIVE=0` does it."""
    with monkeypatch.context() as patch:
        patch.setenv(SWITCH, "0")
        build.cache_clear()
        yield
    build.cache_clear()


@pytest.fixture(params=["kernels", "torch"])
def arithmetic(request: pytest.FixtureRequest) -> str:
    """Once with the kernels, once on torch's own operators."""
    if request.param == "torch":
        request.getfixturevalue("without_kernels")
    elif build().library is None:
        pytest.skip(build().reason)
    return str(request.param)
