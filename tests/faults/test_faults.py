"""Every fault of the table in docs/reliability.md, once each: nothing is lost, and a sentence says what went wrong.

`python -m benchmarks faults --repeats N` does the same again and again, at other moments.
"""

import random

import pytest

from benchmarks.faults.bench import Bench
from benchmarks.faults.cases import CASES, Case, Skipped
from benchmarks.faults.table import Row, markdown, once

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_nothing_is_lost(faults_bench: Bench, case: Case) -> None:
    try:
        assert once(faults_bench, case, random.Random(0)) == []
    except Skipped as reason:
        pytest.skip(str(reason))


def test_the_table_says_what_was_lost() -> None:
    rows = [Row("a", "SIGKILL", "a warning", 3), Row("b", "full", "exit 1", 2, lost=["the weights", "a step"])]
    assert markdown([*rows, Row("c", "skipped here", "nothing")]).splitlines()[2:] == [
        "| SIGKILL | 3 | a warning | nothing |",
        "| full | 2 | exit 1 | 2 times: the weights |",
    ]
