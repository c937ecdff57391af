"""The whole way: prepare → prune → train → evaluate → certify → report."""

from prefect import flow

from configs.schema import Experiment
from flows.classify import compare
from flows.experiment import recorded, tidied
from tasks.certify import certify
from tasks.prepare import prepare
from tasks.prune import prune
from tasks.publish import report
from tasks.records import Reported


@flow(
    name="pipeline",
    flow_run_name="{experiment.name}-seed-{experiment.seed}",
    on_cancellation=[tidied],
    on_crashed=[tidied],
)
def pipeline(experiment: Experiment) -> Reported:
    """Train as `classify` does, then certify the trained network by plain randomised smoothing."""
    with recorded("pipeline", experiment) as tracking:
        prepared = prepare(tracking, experiment.data)
        pruned = prune(tracking, experiment, prepared)
        results = compare(tracking, experiment, prepared, pruned)
        certified = certify(tracking, experiment, prepared, results[0].trained)
        return report(tracking, experiment, prepared, pruned, results, certified)
