"""What workers build module and batches from: plain values, and images that are in a store or were sent to them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from deepzero_core.data import Augmentation, BatchSource, ImageStore, Split
from deepzero_core.models import build_model
from infra.shipping import Parcel, Shipment, received


@dataclass(frozen=True)
class Problem:
    """What a worker needs to build module and data by itself: plain values and the folder of the data store."""

    store: Path
    batches: Mapping[str, Any]
    """Keyword arguments of `BatchSource` without split, mean and std."""
    model: Mapping[str, Any]
    """Keyword arguments of `build_model`."""
    mu: float
    difference: str
    memory: int
    precision: str = "float32"
    device: str = "cpu"
    """Of the workers' torch."""

    def build_batches(self, images: "Images | None" = None) -> BatchSource:
        """From the store, or from images of it that were sent to this worker."""
        options = dict(self.batches)
        augmentation = Augmentation(**options.pop("augmentation"))
        if images is None:
            store = ImageStore.open(self.store)
            split, mean, std = store.split("train"), store.manifest.mean, store.manifest.std
        else:
            split, mean, std = images.split(), images.mean, images.std
        return BatchSource(split, mean=mean, std=std, augmentation=augmentation, **options)

    def build_module(self) -> nn.Module:
        return build_model(**self.model)


@dataclass(frozen=True)
class Images:
    """The training images of a problem, those within its limit, for workers that do not see the store."""

    images: Parcel
    labels: Parcel
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, problem: Problem, shipment: Shipment) -> "Images":
        store = ImageStore.open(problem.store)
        split, limit = store.split("train"), problem.batches.get("limit")
        total = len(split)
        count = total if limit is None else min(limit, total)
        # What `BatchSource` chooses; of these alone it then chooses all.
        chosen = np.arange(count, dtype=np.int64) * total // count
        images, labels = shipment.array(split.images[chosen]), shipment.array(split.labels[chosen])
        return cls(images, labels, store.manifest.mean, store.manifest.std)

    def split(self) -> Split:
        """On a worker, in a task."""
        images, labels = (np.load(received(parcel), mmap_mode="r") for parcel in (self.images, self.labels))
        return Split(images, labels)
