"""Stage: certified robustness of the trained network by plain randomised smoothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from distributed import Client
from prefect.states import State

from configs.defence import Defence
from configs.schema import CertificationConfig, ClusterConfig, Experiment
from deepzero_core.data import ImageStore
from deepzero_core.smoothing import (
    Certificate,
    Certification,
    average_certified_radius,
    certified_accuracy,
)
from infra.certification import Examples, Task, certify_examples, done_before
from infra.classifiers import Recipe
from infra.cluster import open_cluster
from tasks.problem import problem_of
from tasks.progress import Progress
from tasks.records import Certified, Defended, Prepared, Trained, Victim
from tasks.stage import Stage, Tracking, perform, stage_task
from tasks.victim import victim_of


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
        lambda stage: certified(
            stage,
            experiment,
            examples_of(experiment, prepared),
            trained_recipe(experiment, prepared, trained),
            seed=experiment.seed,
        ),
        label=trained.method,
    )


def certified(
    stage: Stage, experiment: Experiment | Defence, examples: Examples, classifier: Recipe, *, seed: int
) -> Certified:
    """Certify examples by any classifier, as the experiment's `certification` and `cluster` say, into a stage's folder.

    The table grows example by example and outlives a kill; metrics and table go to the stage's MLflow run.
    """
    torch.set_num_threads(experiment.training.threads)
    started = time.perf_counter()
    config, labels = experiment.certification, examples.labels()
    task = Task(examples, classifier, settings_of(config), seed)
    done = done_before(stage.folder, examples)
    abstained = 0
    with (
        _client(experiment.cluster, classifier, needed=done < len(labels)) as client,
        Progress(stage.title, len(labels), done) as progress,
    ):

        def advanced(certificate: Certificate) -> None:
            nonlocal abstained
            abstained += certificate.abstained
            progress.advance(f"{abstained} abstained")

        table, certificates = certify_examples(
            task, stage.folder, client=client, timeout_s=experiment.cluster.timeout_s, advanced=advanced
        )
    result = Certified(
        table=table,
        examples=len(labels),
        accuracy_at=certified_accuracy(certificates, labels, config.radii),
        average_radius=average_certified_radius(certificates, labels),
        abstained=sum(c.abstained for c in certificates),
        sigma=config.sigma,
        alpha=config.alpha,
        samples=sum(c.samples for c in certificates),
        saved=sum(c.saved for c in certificates),
        seconds=time.perf_counter() - started,
    )
    stage.run.artifact(table, "certification")
    stage.summarise(
        **{f"certified_accuracy/radius_{radius:g}": share for radius, share in result.accuracy_at.items()},
        average_certified_radius=result.average_radius,
        abstained=result.abstained,
        samples=result.samples,
        samples_saved=result.saved,
        share_of_samples_saved=result.share_saved,
        seconds=result.seconds,
    )
    return result


def settings_of(config: CertificationConfig) -> Certification:
    """The core's settings from the configuration's."""
    return Certification(
        sigma=config.sigma,
        n0=config.n0,
        n=config.n,
        alpha=config.alpha,
        batch_size=config.batch_size,
        adaptive=config.adaptive,
        radii=config.radii,
    )


def examples_of(experiment: Experiment | Defence, prepared: Prepared) -> Examples:
    """Test examples, evenly spaced over what is tested on."""
    split = ImageStore.open(prepared.store).split("test")
    total = min(experiment.data.test_limit or len(split), len(split))
    count = min(experiment.certification.examples, total)
    positions = tuple(position * total // count * len(split) // total for position in range(count))
    return Examples(prepared.store, "test", positions)


def trained_recipe(experiment: Experiment, prepared: Prepared, trained: Trained) -> Recipe:
    """The trained network behind the normalisation of its data."""
    manifest = ImageStore.open(prepared.store).manifest
    return Recipe(
        "infra.classifiers:trained",
        {
            "model": dict(problem_of(experiment, prepared).model),
            "weights": str(trained.weights),
            "mean": list(manifest.mean),
            "std": list(manifest.std),
        },
    )


@contextmanager
def _client(cluster: ClusterConfig, classifier: Recipe, *, needed: bool) -> Iterator[Client | None]:
    """Dask workers, where they are asked for and there is something to do."""
    if not needed or (cluster.workers == 0):
        yield None
        return
    with open_cluster(cluster, mentions=classifier.arguments) as client:
        yield client


@stage_task("certify")
def certify_defended(
    tracking: Tracking, defence: Defence, prepared: Prepared, victim: Victim, defended: Defended
) -> State[Certified] | Certified:
    """Certificates of x ↦ f(D(x)): the classifier behind what a method has put in front of it."""
    inputs = {
        "data": prepared,
        "limit": defence.data.test_limit,
        "victim": victim.fingerprint,
        "purifier": defended.purifier,
        "weights": defended.weights_digest,
        "certification": defence.certification,
        "seed": defended.seed,
        "threads": defence.training.threads,
    }
    classifier = Recipe(
        "infra.classifiers:defended",
        {
            "victim": victim_of(defence, victim),
            "purifier": defended.purifier,
            "weights": None if defended.weights is None else str(defended.weights),
        },
    )
    return perform(
        tracking,
        "certify",
        Certified,
        inputs,
        lambda stage: certified(stage, defence, examples_of(defence, prepared), classifier, seed=defended.seed),
        label=f"{defended.method}, seed {defended.seed}",
    )
