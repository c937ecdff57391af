"""The Python of the documentation runs as it stands there, one block after the other."""

import re
from pathlib import Path
from typing import Any

import pytest

from deepzero_core.perturb.rules import registry

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ["black-boxes.md", "engine.md", "simulators.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rules of a page's own operators are not the engine's.
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks, f"{page} has no example"
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks:
        first = text[: block.start(1)].count("\n")  # so that a traceback names the line of the page
        exec(compile("\n" * first + block.group(1), DOCS / page, "exec"), names)


def test_the_rule_of_the_page_is_what_makes_its_gradients_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its second block the last one fails: the claim of the page is true."""
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    text = (DOCS / "engine.md").read_text(encoding="utf-8")
    layer, _, check = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "documentation"}
    exec(layer, names)
    with pytest.raises(AssertionError, match=r"weight|bias|a$"):
        exec(check, names)
