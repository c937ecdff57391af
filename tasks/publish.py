"""Stage: write the report, and give run, network and report to MLflow and Prefect."""

import time

import torch
from prefect import task

import configs
from configs.schema import Experiment
from deepzero_core.data import ImageStore, to_tensor
from deepzero_core.errors import WorkError
from deepzero_core.models import Normalised
from infra.home import home
from tasks.environment import environment
from tasks.evaluate import trained_module
from tasks.present import present
from tasks.progress import concluded
from tasks.records import Certified, MethodResult, Prepared, Pruned, Reported
from tasks.report import write_report
from tasks.stage import Tracking
from tasks.tracking import Run, run_url


@task(name="report")
def report(
    tracking: Tracking,
    experiment: Experiment,
    prepared: Prepared,
    pruned: Pruned,
    results: list[MethodResult],
    certified: Certified | None = None,
) -> Reported:
    """The report of a flow run; the first result is the experiment's own method, whose network is logged."""
    started = time.monotonic()
    run = Run.resume(tracking.run_id)
    notes = []
    try:
        run.model(*_deployable(experiment, prepared, results[0]), name="classifier")
    except WorkError as error:
        notes.append(f"The network could not be logged as a model: {error}")
    reported = write_report(
        home() / "reports" / tracking.run_id,
        experiment_yaml=configs.dump(experiment),
        title=experiment.name,
        results=results,
        pruned=pruned if pruned.ratios else None,
        prepared=prepared,
        certified=certified,
        environment=environment(),
        mlflow_url=run_url(tracking.experiment_id, tracking.run_id),
        notes=notes,
    )
    present(
        run,
        reported,
        title=experiment.name,
        data=(prepared.name, prepared.digest, prepared.counts),
        summary=_summary(results, certified),
        head_ends_at="Learning curves",
    )
    concluded("report", time.monotonic() - started)
    return reported


def _deployable(experiment: Experiment, prepared: Prepared, result: MethodResult) -> tuple[Normalised, torch.Tensor]:
    """The trained network with its normalisation in front, for images in [0, 1], and an example batch of them."""
    store = ImageStore.open(prepared.store)
    module = trained_module(experiment, prepared, result.trained)
    wrapped = Normalised(module, store.manifest.mean, store.manifest.std).eval()
    return wrapped, to_tensor(store.split("test").images[:2])


def _summary(results: list[MethodResult], certified: Certified | None) -> dict[str, float]:
    """What a list of runs is sorted by in MLflow: the main method plain, the baselines by name."""
    main = results[0]
    values = {
        "test/accuracy": main.evaluated.accuracy,
        "test/loss": main.evaluated.loss,
        "cost/queries": main.trained.queries,
        "cost/seconds": main.trained.seconds,
    }
    values |= {f"baseline/{result.method}": result.evaluated.accuracy for result in results[1:]}
    if certified is not None:
        values |= {f"certified_accuracy/radius_{radius:g}": share for radius, share in certified.accuracy_at.items()}
        values["certified_accuracy/average_radius"] = certified.average_radius
        values["cost/certification_samples"] = certified.samples
        values["cost/certification_samples_saved"] = certified.saved
    return values
