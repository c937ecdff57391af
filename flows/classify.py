"""Train a classifier without a gradient and set it beside the first-order baselines."""

from prefect import flow

from configs.schema import Experiment
from flows.experiment import recorded, tidied
from tasks.evaluate import evaluate
from tasks.prepare import prepare
from tasks.prune import prune
from tasks.publish import report
from tasks.records import MethodResult, Prepared, Pruned, Reported
from tasks.stage import Tracking
from tasks.train import train


@flow(
    name="classify",
    flow_run_name="{experiment.name}-seed-{experiment.seed}",
    on_cancellation=[tidied],
    on_crashed=[tidied],
)
def classify(experiment: Experiment) -> Reported:
    """Prepare the data, prune, train with the configured method and every baseline, evaluate, report."""
    with recorded("classify", experiment) as tracking:
        prepared = prepare(tracking, experiment.data)
        pruned = prune(tracking, experiment, prepared)
        results = compare(tracking, experiment, prepared, pruned)
        return report(tracking, experiment, prepared, pruned, results)


def compare(tracking: Tracking, experiment: Experiment, prepared: Prepared, pruned: Pruned) -> list[MethodResult]:
    """Train and evaluate the experiment's method, then its baselines, on the same batches with the same masks."""
    methods = dict.fromkeys([experiment.training.method, *experiment.baselines])
    results = []
    for method in methods:
        trained = train(tracking, experiment, prepared, pruned, method)
        evaluated = evaluate(tracking, experiment, prepared, trained)
        sparsity = pruned.sparsity if trained.sparse else None
        results.append(MethodResult(method=method, sparsity=sparsity, trained=trained, evaluated=evaluated))
    return results
