"""What a fault cost: weights, history and MLflow record of a run beside those of one that was left alone."""

from collections import Counter
from dataclasses import dataclass

from benchmarks.faults.processes import Home, Process

STEPS = 40
CONFIG = f"""
name: interrupted
data: {{name: digits, batch_size: 64, train_limit: 256, test_limit: 64, crop_padding: 1}}
model: {{name: cnn, depth: 2, width: 60}}
pruning: {{method: random, sparsity: 0.3}}
training:
  epochs: 10
  steps: {STEPS}
  schedule: {{warmup_epochs: 1}}
  checkpoint_every: 2
"""
"""Forty steps of a tenth of a second and more, a checkpoint every second one."""


@dataclass(frozen=True)
class Reference:
    """The run that was left alone."""

    weights: str
    queries: int
    losses: tuple[float, ...]

    @classmethod
    def of(cls, home: Home) -> "Reference":
        record = home.record()
        losses = tuple(line["loss"] for line in home.history() if line["kind"] == "step")
        return cls(record["weights_digest"], record["queries"], losses)


def losses(home: Home, reference: Reference) -> list[str]:
    """What the run in `home` has lost, doubled or changed: nothing, if all is well.

    reference: the run that was left alone.
    """
    found = []
    record = home.record()
    if record["weights_digest"] != reference.weights:
        found.append("the weights are not the same bits")
    if record["queries"] != reference.queries:
        found.append(f"{record['queries']} queries were counted, {reference.queries} were spent")
    steps = [line for line in home.history() if line["kind"] == "step"]
    if [line["step"] for line in steps] != list(range(1, STEPS + 1)):
        found.append("the history has not every step once, in order")
    elif tuple(line["loss"] for line in steps) != reference.losses:
        found.append("the history has other losses")
    return found + _lost_in_mlflow(home, reference)


def _lost_in_mlflow(home: Home, reference: Reference) -> list[str]:
    found, client, runs = [], home.client(), home.runs()
    if running := [run.info.run_name for run in runs if run.info.status == "RUNNING"]:
        found.append(f"MLflow runs still run: {', '.join(map(str, running))}")
    trained = [
        run
        for run in runs
        if (run.info.run_name, run.info.status) == ("train cge", "FINISHED")
        and "deepzero.cached_from" not in run.data.tags
    ]
    if len(trained) != 1:
        return [*found, f"{len(trained)} MLflow runs have finished the training, not one"]
    (run,) = trained
    for key in run.data.metrics:
        points = [point for point in client.get_metric_history(run.info.run_id, key) if point.step]
        counts = Counter(point.step for point in points)
        if doubled := [step for step, count in counts.items() if count > 1]:
            found.append(f"MLflow has {key} twice at {len(doubled)} steps")
        if key == "train/loss":
            sent = {point.step: point.value for point in points}
            if sent != dict(enumerate(reference.losses, start=1)):
                found.append(f"MLflow has {len(sent)} of the {STEPS} losses, or others")
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    if lacking := {"history", "checkpoints", "model"} - names:
        found.append(f"MLflow lacks the artifacts {', '.join(sorted(lacking))}")
    return found


def said_badly(*processes: Process) -> list[str]:
    """Tracebacks in what runs printed."""
    return [
        f"a traceback: {process.errors[process.errors.index('Traceback') :][:300]}"
        for process in processes
        if "Traceback" in process.errors
    ]
