"""Batches that depend on (seed, epoch, index) and on nothing else.

Formats: inputs float32 [B, C, H, W], normalised; targets int64 [B]. Any process that opens the same store gets the same
bits for the same arguments, in any order and without having drawn the batches before.

The random numbers are raw words of Philox, which NumPy guarantees never to change; `Generator.permutation` and its like
may change between versions, and with them every recorded run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from deepzero_core.data.store import Images, Labels, Split
from deepzero_core.errors import RequestError

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
_Words: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

# Independent streams of one seed.
_ORDER, _AUGMENTATION, _PER_CLASS = range(3)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        crop_padding: pixels of black added on each side before a random crop of the old size, as in
            `torchvision.transforms.RandomCrop(H, padding=…)`; 0 for no crop. At most the image's height and width.
        flip: mirror left to right with probability ½.
    """

    crop_padding: int = 0
    flip: bool = False


class BatchSource:
    """Batches of one split.

    An epoch visits every example at most once, in an order drawn from (seed, epoch). Crop and flip of an example are
    drawn from (seed, epoch, position in that order), so they do not depend on the batch size. The last examples of an
    epoch that do not fill a batch are dropped.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation = Augmentation(),
        limit: int | None = None,
    ) -> None:
        """Prepare batches of `split`.

        Args:
            split: images and labels.
            batch_size: examples in a batch.
            seed: non-negative; with the epoch it fixes order and augmentation.
            mean, std: per channel, in units of [0, 1].
            augmentation: changes of the images in `batch`.
            limit: use this many examples only, evenly spaced over the split and hence of all its parts also where
                it is sorted by class; the choice does not depend on the seed. None, or more than there are: all.

        Raises:
            RequestError: an argument out of range, or a batch larger than the examples available.
        """
        if limit is not None and limit < 1:
            raise RequestError(f"limit of examples has to be at least 1, got {limit}")
        if batch_size < 1:
            raise RequestError(f"batch size has to be at least 1, got {batch_size}")
        if seed < 0:
            raise RequestError(f"seed has to be 0 or more, got {seed}")
        total = len(split)
        count = total if limit is None else min(limit, total)
        if batch_size > count:
            raise RequestError(f"batch size {batch_size} is larger than the {count} examples available")
        height, width = split.images.shape[2:]
        if not 0 <= augmentation.crop_padding <= min(height, width):
            raise RequestError(
                f"crop padding has to be between 0 and the image's {min(height, width)} pixels, "
                f"got {augmentation.crop_padding}"
            )
        self._mean, self._std = _channel_constants(mean, std, split.images.shape[1])
        self._split = split
        self._indices = np.arange(count, dtype=np.int64) * total // count
        self._augmentation = augmentation
        self._epoch: tuple[int, Labels, _Words] | None = None
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        """Number of examples in use."""
        return len(self._indices)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, at least one."""
        return len(self) // self.batch_size

    @property
    def labels(self) -> Labels:
        """Labels of the examples in use, int64 [len(self)], in the order of `ordered`."""
        return self._split.labels[self._indices]

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of `epoch`: a pure function of (seed, epoch, index).

        Raises:
            IndexError: a negative epoch, or an index that is not below `steps_per_epoch`.
        """
        if epoch < 0 or not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"no batch {index} in epoch {epoch}: an epoch has {self.steps_per_epoch} batches")
        order, words = self._draw(epoch)
        window = slice(index * self.batch_size, (index + 1) * self.batch_size)
        chosen = order[window]
        images = _augment(self._split.images[chosen], words[window], self._augmentation)
        return self._finish(images, self._split.labels[chosen])

    def ordered(self, batch_size: int) -> Iterator[Batch]:
        """All examples in use in the order of the split, unaugmented; the last batch may be smaller.

        Raises:
            RequestError: a batch size below 1.
        """
        if batch_size < 1:
            raise RequestError(f"batch size has to be at least 1, got {batch_size}")
        return self._ordered(batch_size)

    def per_class(self, count: int) -> Batch:
        """`count` unaugmented examples of each class, drawn from the seed, class by class; e.g. for pruning scores.

        Raises:
            RequestError: a class with fewer examples.
        """
        if count < 1:
            raise RequestError(f"examples per class have to be at least 1, got {count}")
        labels = self.labels
        shuffled = _shuffle(self._indices, _words((self.seed, _PER_CLASS), len(self)))
        by_class = shuffled[np.argsort(self._split.labels[shuffled], kind="stable")]
        classes, starts, sizes = np.unique(np.sort(labels), return_index=True, return_counts=True)
        if sizes.min() < count:
            rarest = int(classes[sizes.argmin()])
            raise RequestError(f"{count} examples per class asked for, class {rarest} has {sizes.min()} in use")
        chosen = by_class[(starts[:, None] + np.arange(count)).ravel()]
        return self._finish(self._split.images[chosen], self._split.labels[chosen])

    def _ordered(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self), batch_size):
            chosen = self._indices[start : start + batch_size]
            yield self._finish(self._split.images[chosen], self._split.labels[chosen])

    def __getstate__(self) -> dict[str, Any]:
        # What can be drawn again need not travel to a worker.
        return {**self.__dict__, "_epoch": None}

    def _draw(self, epoch: int) -> tuple[Labels, _Words]:
        """Order of the epoch's examples, and one random word for each position."""
        # Remembered because consecutive batches ask for the same epoch; it changes nothing but the time.
        if self._epoch is None or self._epoch[0] != epoch:
            order = _shuffle(self._indices, _words((self.seed, epoch, _ORDER), len(self)))
            self._epoch = epoch, order, _words((self.seed, epoch, _AUGMENTATION), len(self))
        return self._epoch[1], self._epoch[2]

    def _finish(self, images: Images, labels: Labels) -> Batch:
        return _normalise(to_tensor(images), self._mean, self._std), torch.from_numpy(labels)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Images uint8 [N, C, H, W] as a new float32 tensor in [0, 1]: x / 255."""
    # torch refuses to look at read-only memory without a warning, and a memory-mapped split is read-only.
    writable = images if images.flags.writeable else images.copy()
    return torch.from_numpy(np.ascontiguousarray(writable)).to(torch.float32).div_(255)


def normalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(x − mean) / std per channel, for images [N, C, H, W] in [0, 1]; returns a new tensor.

    Raises:
        RequestError: not one finite mean and one positive std for each channel.
    """
    constants = _channel_constants(mean, std, images.shape[1])
    centre, scale = (constant.to(images) for constant in constants)
    return _normalise(images.clone(), centre, scale)


def _normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """In place: the caller has just made the tensor."""
    return images.sub_(mean).div_(std)


def _channel_constants(mean: Sequence[float], std: Sequence[float], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std as float32 [1, C, 1, 1]."""
    if not len(mean) == len(std) == channels:
        raise RequestError(
            f"images have {channels} channels, but there are {len(mean)} means and {len(std)} standard deviations"
        )
    if not all(math.isfinite(value) for value in mean) or not all(0 < value < math.inf for value in std):
        raise RequestError(f"means have to be finite and standard deviations positive, got {[*mean]} and {[*std]}")
    centre, scale = (torch.tensor([*values], dtype=torch.float32).reshape(1, -1, 1, 1) for values in (mean, std))
    return centre, scale


def _words(key: tuple[int, ...], count: int) -> _Words:
    """`count` random 64-bit words, a pure function of `key`."""
    words: _Words = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return words


def _shuffle(values: Labels, words: _Words) -> Labels:
    """`values` in the order of their random words: uniform over the permutations."""
    return values[np.argsort(words, kind="stable")]


def _augment(images: Images, words: _Words, augmentation: Augmentation) -> Images:
    """Crop and flip each image as its word says; `images` may be changed.

    Bit 0 decides the flip, bits 1–31 the vertical and bits 32–63 the horizontal place of the crop: ⌊r·k / 2^bits⌋ is
    uniform over 0 … k−1 to within k / 2^31.
    """
    padding = augmentation.crop_padding
    if padding:
        count, channels, height, width = images.shape
        places = np.uint64(2 * padding + 1)
        top = (((words >> np.uint64(1)) & np.uint64(0x7FFFFFFF)) * places) >> np.uint64(31)
        left = ((words >> np.uint64(32)) * places) >> np.uint64(32)
        padded = np.zeros((count, channels, height + 2 * padding, width + 2 * padding), dtype=np.uint8)
        padded[:, :, padding : padding + height, padding : padding + width] = images
        windows = sliding_window_view(padded, (height, width), axis=(2, 3))
        images = windows[np.arange(count), :, top.astype(np.int64), left.astype(np.int64)]
    if augmentation.flip:
        flipped = (words & np.uint64(1)).astype(bool)
        images[flipped] = images[flipped][..., ::-1]
    return images
