"""Stage: have the data store ready."""

import time

from prefect import task

from configs.schema import DataConfig
from deepzero_core.data import prepare as prepare_store
from deepzero_core.data import verify
from infra.home import home
from tasks.progress import concluded
from tasks.records import Prepared
from tasks.stage import Tracking
from tasks.tracking import Run


@task(name="prepare")
def prepare(tracking: Tracking, data: DataConfig) -> Prepared:
    """Build the Arrow store of the data set, or find it there; idempotent by its digest.

    Raises:
        RequestError: files are missing, wrong or damaged; says which.
    """
    started = time.monotonic()
    with Run.start(tracking.experiment_id, "prepare", parent=tracking.run_id) as run:
        path = prepare_store(data.name, home=home(), source=data.source, image_size=data.image_size).path
        # One byte that a disk has changed would change every number of the run.
        verify(path)
        prepared = Prepared.of_store(path)
        run.metrics({f"data/{split}_examples": count for split, count in prepared.counts.items()}, step=0)
        run.artifact(path / "manifest.json", "data")
    concluded("prepare", time.monotonic() - started)
    return prepared
