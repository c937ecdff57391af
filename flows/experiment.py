"""What every flow run has around its stages: a parent run in MLflow with the configuration it came from."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prefect.context import FlowRunContext, get_run_context

import configs
from configs.schema import Section
from deepzero_core.errors import DeepZeroError
from flows.catalogue import PACKAGES
from infra.heeded import heeded
from infra.unread import outlive_readers
from tasks.artifacts import show_link
from tasks.environment import environment
from tasks.stage import Tracking
from tasks.tracking import Run, initialise, run_url
from tasks.tracking_store import tidy
from tasks.waiting import patience_s, settle

_log = logging.getLogger(__name__)
_above: ContextVar[str | None] = ContextVar("_above", default=None)


@contextmanager
def recorded(flow_name: str, experiment: Section) -> Iterator[Tracking]:
    """Open the flow run's parent run; it ends FINISHED, FAILED or KILLED with the flow."""
    for package in PACKAGES:
        # Prefect keeps their lines with the run; without a level of their own only warnings would get that far.
        logging.getLogger(package).setLevel(logging.INFO)
    outlive_readers()
    patience, experiment_id = patience_s(), initialise(experiment.name)
    flow_run = get_run_context().flow_run
    tags = {"deepzero.flow": flow_name, "deepzero.flow_run": str(flow_run.id), **environment()}
    name, above = f"{flow_name} {flow_run.name}", _above.get()
    params = experiment.model_dump(mode="json")
    stopped = True
    try:
        with heeded(), Run.start(experiment_id, name, parent=above, tags=tags, params=params) as run:
            show_link(run_url(experiment_id, run.run_id))
            run.text(configs.dump(experiment), "config/experiment.yaml")
            yield Tracking(experiment_id=experiment_id, run_id=run.run_id)
        stopped = False
    except Exception:
        stopped = False
        raise
    finally:
        if not stopped:  # who asks a run to stop does not wait for MLflow
            settle(patience)


@contextmanager
def below(run_id: str) -> Iterator[None]:
    """Flows that are called meanwhile are shown below that MLflow run, which is of the same experiment."""
    token = _above.set(run_id)
    try:
        yield
    finally:
        _above.reset(token)


def tidied(flow: object, flow_run: object, state: object) -> None:
    """What Prefect calls for a run that was cancelled or has crashed: its process may have been killed untold.

    A worker calls it after the process has ended. The process itself, where that still can, has told everything.
    """
    if FlowRunContext.get() is not None:
        return
    try:
        tidy()
    except DeepZeroError as error:
        _log.warning("%s", error)
