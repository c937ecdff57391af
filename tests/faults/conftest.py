"""One bench for all faults: a Prefect server, a template of a home, and the run that nothing happens to."""

from collections.abc import Iterator

import pytest

from benchmarks.faults.bench import Bench, bench


@pytest.fixture(scope="session")
def faults_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("faults")) as made:
        yield made
