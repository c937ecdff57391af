"""What every flow run has around its stages: a parent run in MLflow with the configuration it came from."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.context import get_run_context

import configs
from configs.schema import Section
from tasks.environment import environment
from tasks.stage import Tracking
from tasks.tracking import Run, initialise
from tasks.waiting import patience_s, settle


@contextmanager
def recorded(flow_name: str, experiment: Section) -> Iterator[Tracking]:
    """Open the flow run's parent run; it ends FINISHED, FAILED or KILLED with the flow."""
    patience, experiment_id = patience_s(), initialise(experiment.name)
    flow_run = get_run_context().flow_run
    tags = {"deepzero.flow": flow_name, "deepzero.flow_run": str(flow_run.id), **environment()}
    name = f"{flow_name} {flow_run.name}"
    stopped = True
    try:
        with Run.start(experiment_id, name, tags=tags, params=experiment.model_dump(mode="json")) as run:
            run.text(configs.dump(experiment), "config/experiment.yaml")
            yield Tracking(experiment_id=experiment_id, run_id=run.run_id)
        stopped = False
    except Exception:
        stopped = False
        raise
    finally:
        if not stopped:  # who asks a run to stop does not wait for MLflow
            settle(patience)
