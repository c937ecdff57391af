"""From configuration to the core's objects: the one place where the two vocabularies meet."""

from typing import Any, Literal

from configs.defence import Defence
from configs.schema import Experiment, ModelConfig
from deepzero_core.data import BatchSource, ImageStore, Split
from infra.problem import Problem
from infra.specs import device_of
from tasks.records import Prepared

MIB = 1 << 20
Network = Literal["denoiser", "autoencoder"]


def problem_of(experiment: Experiment, prepared: Prepared) -> Problem:
    """Module, training batches and finite differences of an experiment, as workers build them too."""
    data, model = experiment.data, experiment.model
    return Problem(
        store=prepared.store,
        batches={
            "batch_size": data.batch_size,
            "seed": experiment.seed,
            "augmentation": {"crop_padding": data.crop_padding, "flip": data.flip},
            "limit": data.train_limit,
        },
        model=model_of(model, prepared, experiment.seed),
        mu=experiment.estimator.mu,
        difference=experiment.estimator.difference,
        precision=experiment.estimator.precision,
        memory=experiment.estimator.memory_mib * MIB,
        device=device_of(experiment.cluster),
    )


def model_of(model: ModelConfig, prepared: Prepared, seed: int) -> dict[str, Any]:
    """Keyword arguments of `build_model` for a classifier of the data."""
    channels, height, width = prepared.image_shape
    return {
        "name": model.name,
        "in_channels": channels,
        "num_classes": len(prepared.class_names),
        "image_size": (height, width),
        "depth": model.depth,
        "width": model.width,
        "arguments": model.arguments,
        "seed": seed,
    }


def network_of(defence: Defence, prepared: Prepared, network: Network, seed: int) -> dict[str, Any]:
    """Keyword arguments of `build_denoiser` for the experiment's denoiser, or for the autoencoder behind it."""
    channels, height, width = prepared.image_shape
    common = {"channels": channels, "image_size": (height, width), "latent": defence.denoiser.latent, "seed": seed}
    if network == "autoencoder":
        return {"name": "autoencoder", **common}
    own = defence.denoiser
    return {"name": own.name, "depth": own.depth, "width": own.width, "arguments": own.arguments, **common}


def limited(split: Split, limit: int | None) -> Split:
    """So many images of a split, evenly spaced over it; None, or more than there are: all."""
    if limit is None or limit >= len(split):
        return split
    chosen = [position * len(split) // limit for position in range(limit)]
    return Split(split.images[chosen], split.labels[chosen])


def test_batches(experiment: Experiment, prepared: Prepared) -> BatchSource:
    """The test split, in order and without augmentation."""
    store = ImageStore.open(prepared.store)
    return BatchSource(
        store.split("test"),
        batch_size=1,
        seed=experiment.seed,
        mean=store.manifest.mean,
        std=store.manifest.std,
        limit=experiment.data.test_limit,
    )


def training_steps(experiment: Experiment, batches: BatchSource) -> int:
    """Steps of a whole training run: its epochs, or fewer where `training.steps` says so."""
    training = experiment.training
    steps = training.epochs * batches.steps_per_epoch
    return steps if training.steps is None else min(steps, training.steps)
