"""Stage: the classifier that is defended. Trained here, or the user's own; asked once what it says of every image."""

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prefect.states import State
from torch import Tensor
from torch.nn import functional as F

from configs.defence import Defence
from deepzero_core.data import BatchSource, ImageStore, Split, to_tensor
from deepzero_core.errors import RequestError
from deepzero_core.oracle import Metered, logits
from deepzero_core.smoothing import label_table
from deepzero_core.training import FirstOrderSource, Schedule, Trainer, TrainingSettings
from infra.victims import open_victim
from tasks.loop import Loop
from tasks.problem import limited, model_of
from tasks.records import Prepared, Victim
from tasks.stage import Stage, Tracking, perform, save_tensors, stage_task

_MOMENTUM = {"momentum": 0.9, "weight_decay": 5e-4}
_AT_ONCE = 1024


@stage_task("victim")
def examine(tracking: Tracking, defence: Defence, prepared: Prepared) -> State[Victim] | Victim:
    """The classifier, its answers to the training images and its accuracy on the test images."""
    # What may be spent, how fast and at what price does not change what it answers.
    unchanged = {"budget", "price_per_thousand", "images_per_second", "calls_per_second", "batch_size", "cache"}
    inputs = {
        "data": prepared,
        "limits": [defence.data.train_limit, defence.data.test_limit],
        "batch_size": defence.data.batch_size if defence.victim.kind == "trained" else None,
        "victim": defence.victim.model_dump(exclude=unchanged),
        "threads": defence.training.threads,
    }
    return perform(tracking, "victim", Victim, inputs, lambda stage: _examine(stage, defence, prepared))


def _examine(stage: Stage, defence: Defence, prepared: Prepared) -> Victim:
    torch.set_num_threads(defence.training.threads)
    started = time.perf_counter()
    trained = _trained(stage, defence, prepared) if defence.victim.kind == "trained" else {}
    described = description(stage.folder, defence) | trained
    store = ImageStore.open(prepared.store)
    train, test = (limited(store.split(name), limit) for name, limit in _limits(defence).items())
    with open_victim(described) as box:
        accuracy = _accuracy(box, test, len(prepared.class_names))
        labels = label_table(lambda images: logits(box, images), train)
        asked = box.statistics
    path = stage.folder / "labels.npy"
    np.save(path, labels.numpy())
    stage.run.artifact(path, "victim")
    seconds = time.perf_counter() - started
    agreement = float((labels.numpy() == train.labels).mean())
    stage.summarise(
        **{"victim/test_accuracy": accuracy, "victim/train_agreement": agreement},
        **{"cost/images_asked": asked.examples, "cost/seconds": seconds},
    )
    return Victim(
        folder=stage.folder,
        kind=defence.victim.kind,
        name=box.name,
        description=described,
        labels=path,
        fingerprint=hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        accuracy=accuracy,
        asked=asked.examples,
        seconds=seconds,
    )


def victim_of(defence: Defence, victim: Victim) -> dict[str, Any]:
    """The classifier as `infra.victims` opens it, with what may be asked of it at present: that may have changed."""
    return victim.description if victim.kind == "trained" else description(victim.folder, defence)


def description(folder: Path, defence: Defence) -> dict[str, Any]:
    """A classifier whose account and cache lie in the stage's folder."""
    victim = defence.victim
    account = [str(folder / "account.sqlite"), "images"]
    if victim.kind == "trained":
        return {"kind": "trained", "account": account}
    settings: dict[str, Any] = dict(victim.settings) | {"answers": victim.answers}
    for key, value in (
        ("batch_size", victim.batch_size),
        ("budget", victim.budget),
        ("examples_per_second", victim.images_per_second),
        ("calls_per_second", victim.calls_per_second),
        ("price_per_thousand", victim.price_per_thousand),
    ):
        settings |= {} if value is None else {key: value}
    cache = str(folder / "answers.sqlite") if victim.cache else None
    return {"kind": victim.kind, "settings": settings, "cache": cache, "account": account}


def _trained(stage: Stage, defence: Defence, prepared: Prepared) -> dict[str, Any]:
    """Train the classifier by first order."""
    from deepzero_core.models import build_model

    victim, data = defence.victim, defence.data
    manifest = ImageStore.open(prepared.store).manifest
    model = model_of(victim.model, prepared, seed=0)
    module = build_model(**model)
    batches = BatchSource(
        ImageStore.open(prepared.store).split("train"),
        batch_size=data.batch_size,
        seed=0,
        mean=manifest.mean,
        std=manifest.std,
        limit=data.train_limit,
    )
    steps = victim.epochs * batches.steps_per_epoch
    settings = TrainingSettings(
        steps=steps, schedule=Schedule(victim.lr, steps, steps // 10), seed=0, optimizer_arguments=_MOMENTUM
    )
    Loop(stage, Trainer(module, batches, FirstOrderSource(F.cross_entropy), settings), checkpoint_every=1000).run()
    weights = stage.folder / "weights.pt"
    save_tensors(weights, module.state_dict())
    stage.run.artifact(weights, "victim")
    return {"model": model, "weights": str(weights), "mean": list(manifest.mean), "std": list(manifest.std)}


def _limits(defence: Defence) -> dict[str, int | None]:
    return {"train": defence.data.train_limit, "test": defence.data.test_limit}


def _accuracy(box: Metered, split: Split, classes: int) -> float:
    """On a split. RequestError: it knows another number of classes than the data."""
    right = 0
    for start in range(0, len(split), _AT_ONCE):
        scores: Tensor = logits(box, to_tensor(split.images[start : start + _AT_ONCE]))
        if scores.shape[1] != classes:
            raise RequestError(
                f"the classifier {box.name} answers {scores.shape[1]} classes, but the data has {classes}: "
                "labels and answers have to mean the same"
            )
        truth = torch.from_numpy(split.labels[start : start + _AT_ONCE].copy())
        right += int((scores.argmax(1) == truth).sum())
    return right / len(split)
