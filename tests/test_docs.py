"""The Python of the documentation runs as it stands there, one block after the other."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ["black-boxes.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks, f"{page} has no example"
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks:
        first = text[: block.start(1)].count("\n")  # so that a traceback names the line of the page
        exec(compile("\n" * first + block.group(1), DOCS / page, "exec"), names)
