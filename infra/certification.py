"""Certification of a list of examples, here or on Dask workers: examples, classifier, settings and a folder → a table.

    shard     a few consecutive examples; what a worker returns is their certificates, nothing else
    worker    holds the examples and the classifier that it has built from its recipe; a plugin, so that a replacement
              of a lost worker builds them again
    luggage   the examples and files that a worker is sent which shares no disk with this process

An example's noise is a function of (seed, its number), and each process computes on one thread where there are workers:
any number of workers, a worker lost on the way, or a run killed and started again give the same table.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import CancelledError, Client, Future, KilledWorker, Worker, WorkerPlugin, get_worker
from torch import Tensor

from deepzero_core.data import ImageStore, to_tensor
from deepzero_core.errors import WorkError
from deepzero_core.smoothing import Certificate, Certification, certify_many
from deepzero_core.training.sources import step_generator
from infra.certificates import Certificates
from infra.classifiers import Classifier, Recipe, files_of, moved
from infra.cluster import shares_disk
from infra.plugins import Absent, name_for, present, withdraw
from infra.shipping import Parcel, Shipment, received
from infra.waiting import finished

log = logging.getLogger(__name__)

_NOISE = 3
_SHARD_SAMPLES = 20_000
"""Copies of a shard, about: long enough that its dispatch costs nothing, short enough to lose."""


@dataclass(frozen=True)
class Examples:
    """Images of a data store, by their positions in a split."""

    store: Path
    split: str
    positions: tuple[int, ...]
    file: Path | None = None
    """These images alone, uint8 in NumPy's format, where the store cannot be seen."""

    def images(self, numbers: Sequence[int]) -> Tensor:
        """[len(numbers), C, H, W] in [0, 1]."""
        if self.file is not None:
            return to_tensor(np.load(self.file, mmap_mode="r")[list(numbers)])
        return to_tensor(ImageStore.open(self.store).split(self.split).images[[self.positions[i] for i in numbers]])

    def labels(self) -> list[int]:
        labels = ImageStore.open(self.store).split(self.split).labels
        return [int(labels[position]) for position in self.positions]


@dataclass(frozen=True)
class Task:
    """What is certified, by which classifier, how. Plain values and paths: it travels to workers as it is."""

    examples: Examples
    classifier: Recipe
    settings: Certification
    seed: int

    def build(self) -> Classifier:
        return self.classifier.build(self.examples.images([0])[0])

    def certificates(self, classifier: Classifier, numbers: Sequence[int]) -> Iterator[Certificate]:
        """The certificates of some examples, in order."""
        generators = (step_generator(self.seed, _NOISE, number) for number in numbers)
        return certify_many(classifier, self._each(numbers), self.settings, generators=generators)

    def _each(self, numbers: Sequence[int]) -> Iterator[Tensor]:
        for number in numbers:
            yield self.examples.images([number])[0]


@dataclass(frozen=True)
class Luggage:
    """What a task mentions by its place on this machine's disk: the images, and files by their paths."""

    images: Parcel
    files: Mapping[str, Parcel]

    @classmethod
    def of(cls, task: Task, shipment: Shipment) -> "Luggage":
        """RequestError: the classifier keeps something on this machine's disk that several machines cannot share."""
        examples = task.examples
        chosen = ImageStore.open(examples.store).split(examples.split).images[list(examples.positions)]
        files = {path: shipment.file(Path(path)) for path in files_of(task.classifier)}
        return cls(shipment.array(chosen), files)

    def unpack(self, task: Task) -> Task:
        """The task as this worker can do it."""
        places = {path: str(received(parcel)) for path, parcel in self.files.items()}
        examples = replace(task.examples, file=received(self.images))
        return replace(task, examples=examples, classifier=moved(task.classifier, places))


def certify_examples(
    task: Task,
    folder: Path,
    *,
    client: Client | None = None,
    timeout_s: float = 60.0,
    advanced: Callable[[Certificate], None] = lambda _: None,
) -> tuple[Path, list[Certificate]]:
    """The table of all certificates in `folder`, and the certificates in the order of the examples.

    What an earlier call with the same task has left there, complete or not, is not done again. `advanced` is told of
    every certificate that is new, when it is on disk. Without a client everything runs in this process.

    Raises:
        RequestError: the classifier cannot be built, or does not fit the examples.
        WorkError: no worker for longer than `timeout_s`, the scheduler was lost, or a shard kills its workers.
    """
    kept = Certificates(folder, task.examples.labels())
    missing = [number for number in range(len(task.examples.positions)) if number not in kept.found]
    if missing:
        coming = _here(task, missing) if client is None else _on_workers(task, missing, client, timeout_s)
        for number, certificate in coming:
            kept.add(number, certificate)
            advanced(certificate)
    return kept.table, kept.close()


def done_before(folder: Path, examples: Examples) -> int:
    """How many examples need no more work."""
    return len(Certificates(folder, examples.labels()).found)


def _here(task: Task, numbers: Sequence[int]) -> Iterator[tuple[int, Certificate]]:
    yield from zip(numbers, task.certificates(task.build(), numbers), strict=True)


class CertificationWorker(WorkerPlugin):
    """A worker's classifier; built when first needed, so that its mistakes are those of a task and are reported."""

    def __init__(self, name: str, task: Task, luggage: Luggage | None = None) -> None:
        self.name, self._task, self._luggage = name, task, luggage
        self._built: tuple[Task, Classifier] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CertificationWorker, (self.name, self._task, self._luggage)

    def setup(self, worker: Worker) -> None:
        torch.set_num_threads(1)

    def certificates(self, numbers: Sequence[int]) -> list[Certificate]:
        if self._built is None:
            task = self._task if self._luggage is None else self._luggage.unpack(self._task)
            self._built = task, task.build()
        task, classifier = self._built
        return list(task.certificates(classifier, numbers))


def _shard(plugin: str, numbers: Sequence[int]) -> list[Certificate] | Absent:
    worker: CertificationWorker | None = get_worker().plugins.get(plugin)
    return Absent.PLUGIN if worker is None else worker.certificates(numbers)


def _on_workers(
    task: Task, numbers: Sequence[int], client: Client, timeout_s: float
) -> Iterator[tuple[int, Certificate]]:
    """Certificates as they come, in any order."""
    name = name_for(client, "certification")
    size = max(1, _SHARD_SAMPLES // (task.settings.n0 + task.settings.n))
    shards: dict[Future, Sequence[int]] = {}
    shipment = None if shares_disk(client) else Shipment(client)
    try:
        luggage = None if shipment is None else Luggage.of(task, shipment)
        client.register_plugin(CertificationWorker(name, task, luggage))
        for position in range(0, len(numbers), size):
            part = numbers[position : position + size]
            shards[client.submit(_shard, name, part, key=f"{name}-{part[0]}", pure=False)] = part
        while shards:
            for future in finished(client, list(shards), timeout_s):
                yield from zip(shards.pop(future), present(future.result()), strict=True)
    except KilledWorker as error:
        raise WorkError(
            f"a shard of examples was tried on {error.allowed_failures + 1} Dask workers and each of them died; see to "
            "their memory, or take a smaller certification.batch_size"
        ) from error
    except (CancelledError, OSError) as error:
        raise WorkError("the Dask scheduler was lost in the middle of a certification") from error
    finally:
        if client.status == "running":
            with suppress(CancelledError, OSError, TimeoutError):
                client.cancel(list(shards))
        withdraw(client, name)
