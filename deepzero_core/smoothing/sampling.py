"""Noisy copies of one or many examples through a classifier, in batches as full as can be.

A batch takes what the first unfinished course wants, then the next, and further examples are begun while there is room.
Every example draws its own copies from its own generator in its own order: who shares a batch with whom changes nothing
but the time, as far as the classifier treats its examples one by one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from deepzero_core.errors import DeepZeroError, RequestError, WorkError
from deepzero_core.smoothing.copies import NoisyCopies
from deepzero_core.smoothing.courses import Course

Classifier = Callable[[Tensor], Tensor]
R = TypeVar("R")


def run(classifier: Classifier, begun: Iterable[tuple[NoisyCopies, Course[R]]], batch_size: int) -> Iterator[R]:
    """The results of the courses, in their order; each pair is asked for when there is room for it.

    RequestError: the classifier has BatchNorm in training mode, cannot take the images or does not answer [N, K].
    WorkError: it failed later, or its scores are not numbers.
    """
    refuse_training(classifier)
    coming, active, count = iter(begun), deque[_Example[R]](), _Counter(classifier)
    while True:
        batch: list[tuple[_Example[R], int]] = []
        room = batch_size
        for example in active:
            room -= example.take(room, batch)
        while room and (pair := next(coming, None)) is not None:
            active.append(_Example(*pair))
            room -= active[-1].take(room, batch)
        if not batch:
            return
        sizes = [size for _, size in batch]
        images = batch[0][0].copies.room(sum(sizes))
        for (example, _), part in zip(batch, images.split(sizes), strict=True):
            example.copies.write(part)
        for (example, size), counts in zip(batch, count(images, sizes), strict=True):
            example.receive(size, counts)
        while active and active[0].result:
            yield active.popleft().result[0]


class _Example(Generic[R]):
    """One course under way: what it still wants, and what has been counted of it."""

    def __init__(self, copies: NoisyCopies, course: Course[R]) -> None:
        self.copies, self._course = copies, course
        self.result: tuple[R, ...] = ()
        self._wanted = self._missing = next(course)
        self._counts: Tensor | None = None

    def take(self, room: int, batch: "list[tuple[_Example[R], int]]") -> int:
        """Put as many copies as are wanted and fit on the list; how many."""
        size = min(room, self._wanted)
        if size:
            batch.append((self, size))
            self._wanted -= size
        return size

    def receive(self, size: int, counts: Tensor) -> None:
        self._counts = counts if self._counts is None else self._counts + counts
        self._missing -= size
        if self._missing:
            return
        counted, self._counts = self._counts, None
        try:
            self._wanted = self._missing = self._course.send(counted)
        except StopIteration as end:
            self.result = (end.value,)


class _Counter:
    """The classifier, whose answers are checked and counted by example."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._classes: int | None = None

    def __call__(self, images: Tensor, sizes: list[int]) -> list[Tensor]:
        """How often each class is the answer to each run of `sizes` images: int64 [K] each."""
        labels = self._labels(images)
        classes = self._classes
        assert classes is not None
        owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        counts = torch.bincount(owners * classes + labels, minlength=len(sizes) * classes)
        return list(counts.view(len(sizes), classes))

    def _labels(self, images: Tensor) -> Tensor:
        scores = self._scores(images)
        if not isinstance(scores, Tensor):
            raise RequestError(f"the classifier must answer with a tensor of scores, not {type(scores).__name__}")
        fits = scores.ndim == 2 and len(scores) == len(images) and scores.shape[1] >= 2
        if not fits or self._classes not in (None, scores.shape[1]):
            raise RequestError(
                f"the classifier must answer {len(images)} examples with scores of shape "
                f"[{len(images)}, {self._classes or 'K ≥ 2'}], but answered with {list(scores.shape)}"
            )
        if scores.is_complex() or scores.dtype == torch.bool:
            raise RequestError(f"the classifier must answer with scores that can be ordered, not with {scores.dtype}")
        if bool(torch.isnan(scores).any()):
            raise WorkError("the classifier answered with scores that are not numbers (NaN)")
        self._classes = scores.shape[1]
        return scores.argmax(dim=1).cpu()

    def _scores(self, images: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                return self._classifier(images)
        except DeepZeroError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if self._classes is not None or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = next(iter(str(error).strip().splitlines()), "")
            raise RequestError(
                f"the classifier cannot take images of shape {list(images.shape)}: {type(error).__name__}: {reason}"
            ) from error


def refuse_training(classifier: Classifier) -> None:
    """RequestError: BatchNorm in training mode, where it can be seen."""
    if isinstance(classifier, nn.Module) and any(
        layer.training for layer in classifier.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ):
        raise RequestError(
            "the classifier has BatchNorm in training mode, where one example's answer depends on the others; "
            "call .eval() on it first"
        )
