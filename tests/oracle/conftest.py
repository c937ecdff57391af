"""The scoring server of these tests, one for a test or one for all that Hypothesis draws."""

from collections.abc import Iterator

import pytest
from scoring import Server, listening


@pytest.fixture
def server() -> Iterator[Server]:
    with listening() as place:
        yield place


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    """One for all examples that Hypothesis draws."""
    with listening() as place:
        yield place
