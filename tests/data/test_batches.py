"""Batches are a pure function of (seed, epoch, index), and equal to a slow and obvious construction of them."""

import pickle

import numpy as np
import pytest
import torch

from deepzero_core.data import Augmentation, BatchSource, Split, normalise, to_tensor
from deepzero_core.errors import RequestError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CROP_AND_FLIP = Augmentation(crop_padding=2, flip=True)


def make_split(count=50, shape=(3, 6, 5), classes=5):
    rng = np.random.default_rng(3)
    return Split(
        rng.integers(1, 256, (count, *shape), dtype=np.uint8), np.arange(count, dtype=np.int64) * classes // count
    )


SPLIT = make_split()


def source(split=SPLIT, **changes):
    arguments = {"batch_size": 8, "seed": 1, "mean": MEAN, "std": STD, "augmentation": CROP_AND_FLIP}
    return BatchSource(split, **{**arguments, **changes})


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def slow_batch(split, seed, epoch, index, batch_size, augmentation):
    """The definition, one example at a time."""

    def words(*key):
        return np.random.Philox(np.random.SeedSequence(key)).random_raw(len(split))

    order = sorted(range(len(split)), key=lambda i: words(seed, epoch, 0)[i])
    inputs, targets = [], []
    for position in range(index * batch_size, (index + 1) * batch_size):
        image = torch.from_numpy(split.images[order[position]].copy())
        word, padding = int(words(seed, epoch, 1)[position]), augmentation.crop_padding
        if padding:
            places = 2 * padding + 1
            top = (((word >> 1) & 0x7FFFFFFF) * places) >> 31
            left = ((word >> 32) * places) >> 32
            padded = torch.nn.functional.pad(image, (padding,) * 4)
            image = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        if augmentation.flip and word & 1:
            image = image.flip(-1)
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (MEAN, STD))
        inputs.append((image.to(torch.float32) / 255 - mean) / std)
        targets.append(int(split.labels[order[position]]))
    return torch.stack(inputs), torch.tensor(targets)


AUGMENTATIONS = {
    "none": Augmentation(),
    "crop": Augmentation(crop_padding=2),
    "flip": Augmentation(flip=True),
    "crop-flip": CROP_AND_FLIP,
    "crop-all": Augmentation(crop_padding=5),
}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_agrees_bit_for_bit_with_the_slow_construction(augmentation):
    batches = source(augmentation=augmentation)
    for epoch, index in ((0, 0), (0, 5), (3, 2)):
        inputs, targets = batches.batch(epoch, index)
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert inputs.shape == (8, 3, 6, 5)
        assert inputs.is_contiguous()
        assert same((inputs, targets), slow_batch(SPLIT, 1, epoch, index, 8, augmentation))


def test_batches_do_not_depend_on_what_was_drawn_before():
    forward, backward = source(), source()
    wanted = [(epoch, index) for epoch in range(3) for index in range(forward.steps_per_epoch)]
    first = {key: forward.batch(*key) for key in wanted}
    for key in reversed(wanted):
        assert same(backward.batch(*key), first[key])
    copy = pickle.loads(pickle.dumps(forward))
    assert same(copy.batch(2, 1), first[2, 1])


def test_seed_and_epoch_change_order_and_augmentation():
    base = source().batch(0, 0)
    assert not same(base, source().batch(1, 0))
    assert not same(base, source(seed=2).batch(0, 0))
    single = make_split(count=1, classes=1)
    drawn = {source(single, batch_size=1).batch(epoch, 0)[0].numpy().tobytes() for epoch in range(200)}
    assert len(drawn) > 40, "of 25 places and two directions"


def test_global_generators_are_left_alone():
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    source().batch(0, 0)
    source().per_class(2)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_augmentation_does_not_depend_on_the_batch_size():
    large, small = source(batch_size=16), source(batch_size=8)
    inputs, targets = large.batch(4, 1)
    for half in range(2):
        part = slice(8 * half, 8 * half + 8)
        assert same((inputs[part], targets[part]), small.batch(4, 2 + half))


def test_an_epoch_visits_each_example_once_and_drops_the_rest():
    split = Split(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1), np.zeros(50, dtype=np.int64))
    batches = source(split, mean=(0,), std=(1,), augmentation=Augmentation())
    assert batches.steps_per_epoch == 6
    seen = torch.cat([batches.batch(0, index)[0] for index in range(6)]).mul(255).round().int().flatten().tolist()
    assert len(seen) == len(set(seen)) == 48
    assert seen != sorted(seen)


def test_the_store_is_never_written_to():
    images = SPLIT.images.copy()
    source().batch(0, 0)
    source(augmentation=Augmentation(flip=True)).batch(0, 0)
    list(source().ordered(7))
    np.testing.assert_array_equal(SPLIT.images, images)


def test_crop_places_and_flips_are_uniform():
    image = np.arange(1, 26, dtype=np.uint8).reshape(1, 1, 5, 5)
    split = Split(np.repeat(image, 9000, axis=0), np.zeros(9000, dtype=np.int64))
    batches = source(split, batch_size=9000, mean=(0,), std=(1,), augmentation=Augmentation(1, flip=True))
    inputs, _ = batches.batch(0, 0)
    middle = inputs[:, 0, 2, 2].mul(255).round().int()
    counts = torch.bincount(middle, minlength=26)
    # The middle pixel is one of the nine central ones, each with probability 1/9: 1000 expected, standard deviation 30.
    assert (counts > 0).sum() == 9
    assert ((counts[counts > 0] - 1000).abs() < 150).all()
    flipped = (inputs[:, 0, 2, 1] > inputs[:, 0, 2, 3]).float().mean()
    assert abs(flipped - 0.5) < 0.03


def test_ordered_gives_everything_in_order_and_unaugmented():
    batches = list(source().ordered(16))
    assert [len(targets) for _, targets in batches] == [16, 16, 16, 2]
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert torch.equal(inputs, normalise(to_tensor(SPLIT.images), MEAN, STD))
    assert torch.equal(torch.cat([targets for _, targets in batches]), torch.from_numpy(SPLIT.labels))


def test_limit_takes_evenly_spaced_examples_whatever_the_seed():
    batches = source(limit=10, batch_size=10)
    assert (len(batches), batches.steps_per_epoch) == (10, 1)
    ((inputs, targets),) = batches.ordered(10)
    assert torch.equal(inputs, normalise(to_tensor(SPLIT.images[::5]), MEAN, STD))
    assert targets.tolist() == batches.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert sorted(batches.batch(0, 0)[1].tolist()) == targets.tolist()
    assert source(limit=10, batch_size=10, seed=9).labels.tolist() == targets.tolist()
    assert len(source(limit=1000)) == 50


def test_per_class_draws_that_many_of_each():
    batches = source()
    inputs, targets = batches.per_class(4)
    assert targets.tolist() == [label for label in range(5) for _ in range(4)]
    assert len({image.numpy().tobytes() for image in inputs}) == 20
    assert same((inputs, targets), source(batch_size=3, augmentation=Augmentation()).per_class(4))
    assert not torch.equal(inputs, source(seed=2).per_class(4)[0])
    everything = normalise(to_tensor(SPLIT.images), MEAN, STD)
    for image, target in zip(inputs, targets, strict=True):
        (at,) = (everything == image).all(dim=(1, 2, 3)).nonzero().flatten().tolist()
        assert SPLIT.labels[at] == target


def test_helpers():
    images = np.array([[[[0, 51], [102, 255]]]], dtype=np.uint8)
    unit = to_tensor(images)
    torch.testing.assert_close(unit, torch.tensor([[[[0.0, 0.2], [0.4, 1.0]]]]), rtol=1e-7, atol=0)
    torch.testing.assert_close(normalise(unit, (0.2,), (0.5,)), (unit - 0.2) / 0.5, rtol=1e-6, atol=1e-7)
    assert unit.max() == 1, "normalise leaves its argument alone"
    images.flags.writeable = False
    assert torch.equal(to_tensor(images[..., ::-1]), unit.flip(-1))


WRONG = {
    "batch-large": ({"batch_size": 51}, "batch size 51 is larger than the 50 examples available"),
    "batch-large-limit": ({"batch_size": 8, "limit": 7}, "batch size 8 is larger than the 7 examples available"),
    "batch-zero": ({"batch_size": 0}, "batch size has to be at least 1, got 0"),
    "limit": ({"limit": 0}, "limit of examples has to be at least 1, got 0"),
    "seed": ({"seed": -1}, "seed has to be 0 or more, got -1"),
    "padding-negative": (
        {"augmentation": Augmentation(-1)},
        "between 0 and .* 5 pixels, got -1",
    ),
    "padding-large": ({"augmentation": Augmentation(6)}, "between 0 and .* 5 pixels, got 6"),
    "mean-count": ({"mean": (0.5,)}, "images have 3 channels, but there are 1 means and 3 standard deviations"),
    "std-zero": ({"std": (0.5, 0.0, 0.5)}, "standard deviations positive"),
    "mean-nan": ({"mean": (0.5, float("nan"), 0.5)}, "means have to be finite"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_impossible_arguments(changes, message):
    with pytest.raises(RequestError, match=message):
        source(**changes)


def test_impossible_calls():
    batches = source()
    with pytest.raises(RequestError, match="batch size has to be at least 1"):
        batches.ordered(0)
    with pytest.raises(RequestError, match="11 examples per class asked for, class 0 has 10 in use"):
        batches.per_class(11)
    with pytest.raises(RequestError, match="at least 1, got 0"):
        batches.per_class(0)
    for epoch, index in ((0, 6), (0, -1), (-1, 0)):
        with pytest.raises(IndexError, match="an epoch has 6 batches"):
            batches.batch(epoch, index)


# Recorded once: what is drawn for a seed must never change, or resumed and repeated runs differ.
GOLDEN_ORDER = {0: [8, 4, 3, 6, 2, 1, 0, 5, 11, 9, 10, 7], 1: [7, 9, 10, 11, 6, 1, 4, 8, 3, 2, 5, 0]}
# The pixels left and right of the middle of a 5x5 image that counts its pixels from 1.
GOLDEN_PIXELS = [[9, 7], [12, 14], [13, 15], [13, 11], [14, 12], [18, 16]]


def test_golden_values():
    split = Split(np.zeros((12, 1, 1, 1), dtype=np.uint8), np.arange(12, dtype=np.int64))
    batches = source(split, batch_size=12, seed=7, mean=(0,), std=(1,), augmentation=Augmentation())
    assert {epoch: batches.batch(epoch, 0)[1].tolist() for epoch in GOLDEN_ORDER} == GOLDEN_ORDER

    images = np.arange(1, 26, dtype=np.uint8).reshape(1, 1, 5, 5).repeat(6, axis=0)
    split = Split(images, np.zeros(6, dtype=np.int64))
    batches = source(split, batch_size=6, seed=7, mean=(0,), std=(1,), augmentation=Augmentation(1, flip=True))
    pixels = batches.batch(0, 0)[0].mul(255).round().int()
    assert pixels[:, 0, 2, [1, 3]].tolist() == GOLDEN_PIXELS
