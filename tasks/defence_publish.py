"""Stage: write the report of a defence, and give run, defended classifier and report to MLflow and Prefect."""

import time
from collections.abc import Sequence

import torch
from prefect import task

import configs
from configs.defence import Defence
from deepzero_core.data import ImageStore, to_tensor
from deepzero_core.errors import WorkError
from deepzero_core.oracle import logits
from infra.classifiers import purifier_of
from infra.home import home
from infra.victims import open_victim
from tasks.defence_plots import DEFENCE_NAMES, Row, noisy_images
from tasks.defence_report import write_defence_report
from tasks.environment import environment
from tasks.present import present
from tasks.problem import limited
from tasks.progress import concluded
from tasks.records import DefenceResult, Prepared, Reported, Victim
from tasks.seeds import by_method
from tasks.stage import Tracking
from tasks.tracking import Run, run_url
from tasks.tracking_defended import log_defended
from tasks.victim import victim_of

_SHOWN = 8


@task(name="report")
def report_defence(
    tracking: Tracking, defence: Defence, prepared: Prepared, victim: Victim, results: list[DefenceResult]
) -> Reported:
    """The report of a flow run; the first result is the experiment's own method, which is logged as a model."""
    started = time.monotonic()
    run = Run.resume(tracking.run_id)
    notes = []
    try:
        log_defended(run, defence, prepared, victim, results[0].defended)
    except WorkError as error:
        notes.append(f"The defended classifier could not be logged as a model: {error}")
    reported = write_defence_report(
        home() / "reports" / tracking.run_id,
        experiment_yaml=configs.dump(defence),
        title=defence.name,
        results=results,
        victim=victim,
        prepared=prepared,
        queries_per_step=defence.training.queries,
        price_per_thousand=defence.victim.price_per_thousand,
        rows=_rows(defence, prepared, victim, results),
        environment=environment(),
        mlflow_url=run_url(tracking.experiment_id, tracking.run_id),
        notes=notes,
    )
    present(
        run,
        reported,
        title=defence.name,
        data=(prepared.name, prepared.digest, prepared.counts),
        summary=_summary(results, victim),
        head_ends_at="Certified accuracy by radius",
    )
    concluded("report", time.monotonic() - started)
    return reported


def _rows(defence: Defence, prepared: Prepared, victim: Victim, results: list[DefenceResult]) -> list[Row]:
    """Test images, the same with noise, and what every method makes of them with the first seed."""
    split = limited(ImageStore.open(prepared.store).split("test"), _SHOWN)
    images, truth = to_tensor(split.images), [int(label) for label in split.labels]
    noisy = noisy_images(images, defence.certification.sigma)
    shown = [("image", images), ("with noise", noisy)]
    for method, several in by_method(results).items():
        defended = several[0].defended
        if defended.purifier is not None and defended.weights is not None:
            network = purifier_of(defended.purifier, str(defended.weights))
            with torch.no_grad():
                shown.append((DEFENCE_NAMES[method], network(noisy)))
    names = prepared.class_names
    rows = []
    with open_victim(victim_of(defence, victim)) as box:
        for name, pictures in shown:
            answers: Sequence[int] = logits(box, pictures).argmax(1).tolist()
            right = [answer == label for answer, label in zip(answers, truth, strict=True)]
            rows.append(Row(name, pictures, [names[answer] for answer in answers], right))
    return rows


def _summary(results: list[DefenceResult], victim: Victim) -> dict[str, float]:
    """What a list of runs is sorted by in MLflow: means over the seeds, the main method plain, the others by name."""
    values = {"victim/test_accuracy": victim.accuracy}
    for number, (method, several) in enumerate(by_method(results).items()):
        prefix = "" if number == 0 else f"baseline/{method}/"
        for radius in several[0].certified.accuracy_at:
            shares = [r.certified.accuracy_at[radius] for r in several]
            values[f"{prefix}certified_accuracy/radius_{radius:g}"] = sum(shares) / len(shares)
        radii = [r.certified.average_radius for r in several]
        values[f"{prefix}certified_accuracy/average_radius"] = sum(radii) / len(radii)
    main = next(iter(by_method(results).values()))
    values["cost/queries"] = sum(r.defended.queries for r in main) / len(main)
    values["cost/images_asked"] = sum(r.defended.asked for r in main) / len(main)
    values["cost/seconds"] = sum(r.defended.seconds for r in main) / len(main)
    return values
