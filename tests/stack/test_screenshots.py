"""The pictures of the documentation are pictures of a stack that runs, taken in headless Chromium."""

import shutil
from pathlib import Path

import pytest
from stacks import Command

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="there is no Chromium")
def test_pages_of_a_running_stack(module_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed: pip install '.[screenshots]'")
    from screenshots import LARGEST, take

    from infra.stack.state import running

    deepzero = Command(module_home, {})
    try:
        assert deepzero("up", "--workers", "1").returncode == 0
        for seed in (0, 1):
            done = deepzero("trigger", "classify", "--config", "smoke", "--set", f"seed={seed}", "--watch")
            assert done.returncode == 0, done.stderr
        stack = running(module_home)
        assert stack is not None
        pictures = take(stack, tmp_path)
        assert len(pictures) == 8
        assert all(0 < picture.stat().st_size <= LARGEST for picture in pictures)
    finally:
        deepzero("down")
