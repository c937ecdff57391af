"""Stage: certified robustness of the trained network by plain randomised smoothing."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from prefect.states import State

from configs.schema import Experiment
from deepzero_core.data import ImageStore, to_tensor
from deepzero_core.models import Normalised
from deepzero_core.smoothing import Certificate, average_certified_radius, certified_accuracy
from deepzero_core.smoothing import certify as certify_example
from deepzero_core.training.sources import step_generator
from tasks.evaluate import trained_module
from tasks.problem import test_batches
from tasks.progress import Progress
from tasks.records import Certified, Prepared, Trained
from tasks.stage import Stage, Tracking, perform, stage_task

_NOISE = 3


@stage_task("certify")
def certify(
    tracking: Tracking, experiment: Experiment, prepared: Prepared, trained: Trained
) -> State[Certified] | Certified:
    """Certificates of test examples, evenly spaced over the split."""
    inputs = {
        "data": prepared,
        "limit": experiment.data.test_limit,
        "model": experiment.model,
        "weights": trained.weights_digest,
        "certification": experiment.certification,
        "seed": experiment.seed,
        "threads": experiment.training.threads,
    }
    return perform(
        tracking,
        "certify",
        Certified,
        inputs,
        lambda stage: _certify(stage, experiment, prepared, trained),
        label=trained.method,
    )


def _certify(stage: Stage, experiment: Experiment, prepared: Prepared, trained: Trained) -> Certified:
    torch.set_num_threads(experiment.training.threads)
    started = time.perf_counter()
    settings = experiment.certification
    manifest = ImageStore.open(prepared.store).manifest
    # σ is in units of images in [0, 1], so that the noise comes before the normalisation.
    classifier = Normalised(trained_module(experiment, prepared, trained), manifest.mean, manifest.std).eval()
    images, labels = _examples(experiment, prepared)
    certificates, seconds = [], []
    with Progress(stage.title, len(labels)) as progress:
        for number, image in enumerate(images):
            began = time.perf_counter()
            certificates.append(
                certify_example(
                    classifier,
                    image,
                    sigma=settings.sigma,
                    n0=settings.n0,
                    n=settings.n,
                    alpha=settings.alpha,
                    batch_size=settings.batch_size,
                    generator=step_generator(experiment.seed, _NOISE, number),
                )
            )
            seconds.append(time.perf_counter() - began)
            progress.advance(f"{sum(not c.abstained for c in certificates)} of {number + 1} certified")
    table = _write_table(stage, certificates, labels, seconds)
    accuracy_at = certified_accuracy(certificates, labels, settings.radii)
    radius = average_certified_radius(certificates, labels)
    stage.run.artifact(table, "certification")
    stage.summarise(
        **{f"certified_accuracy/radius_{radius:g}": value for radius, value in accuracy_at.items()},
        average_certified_radius=radius,
        abstained=sum(c.abstained for c in certificates),
        samples=sum(c.samples for c in certificates),
        seconds=time.perf_counter() - started,
    )
    return Certified(
        table=table,
        examples=len(labels),
        accuracy_at=accuracy_at,
        average_radius=radius,
        abstained=sum(c.abstained for c in certificates),
        sigma=settings.sigma,
        alpha=settings.alpha,
        samples=sum(c.samples for c in certificates),
        seconds=time.perf_counter() - started,
    )


def _examples(experiment: Experiment, prepared: Prepared) -> tuple[torch.Tensor, list[int]]:
    """Images [N, C, H, W] in [0, 1] and labels of the examples to certify."""
    split = ImageStore.open(prepared.store).split("test")
    total = len(test_batches(experiment, prepared))
    count = min(experiment.certification.examples, total)
    chosen = [position * total // count * len(split) // total for position in range(count)]
    return to_tensor(split.images[chosen]), [int(split.labels[i]) for i in chosen]


def _write_table(stage: Stage, certificates: list[Certificate], labels: list[int], seconds: list[float]) -> Path:
    path = stage.folder / "certificates.parquet"
    columns = {
        "example": list(range(len(labels))),
        "label": labels,
        "predicted": [c.label for c in certificates],
        "radius": [c.radius for c in certificates],
        "p_lower": [c.p_lower for c in certificates],
        "samples": [c.samples for c in certificates],
        "seconds": seconds,
    }
    pq.write_table(pa.table(columns), path)
    return path
