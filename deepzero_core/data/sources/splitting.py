"""Deterministic stratified split for data that come without a test split."""

import math

import numpy as np

from deepzero_core.errors import RequestError

TEST_SHARE = 0.2

_Indices = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def stratified_split(labels: np.ndarray, *, share: float = TEST_SHARE, name: str) -> tuple[_Indices, _Indices]:
    """Indices of the train and of the test examples, each int64 and ascending.

    ⌈share·N⌉ examples are for testing. Classes take part in proportion to their size (largest remainder, ties by
    label), each keeps at least one example for training, and which of its examples go is drawn once and for all.

    Args:
        labels: integers [N].
        share: of the examples, for testing.
        name: of the data set, for the message.

    Raises:
        RequestError: no class has two examples.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if len(sizes) == 0 or sizes.max() < 2:
        raise RequestError(f"data set {name!r} has too few examples to set some aside for testing; give a test split")
    quota = sizes * share
    taken = np.minimum(np.floor(quota).astype(np.int64), sizes - 1)
    for position in np.argsort(-(quota - np.floor(quota)), kind="stable"):
        if taken.sum() < math.ceil(share * len(labels)) and taken[position] < sizes[position] - 1:
            taken[position] += 1

    test = []
    for label, count in zip(classes, taken, strict=True):
        members = np.flatnonzero(labels == label)
        # Raw words of a bit generator never change between NumPy versions, and so neither does the split.
        words = np.random.Philox(np.random.SeedSequence([int(label)])).random_raw(len(members))
        test.append(members[np.argsort(words, kind="stable")[:count]])
    test_indices = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test_indices), test_indices
