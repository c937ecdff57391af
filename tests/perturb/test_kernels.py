"""The kernels of attention, feed-forward, layer normalisation and polynomials against their formulas in float64."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.perturb.native import dense
from deepzero_core.perturb.native.attention import attention_change
from deepzero_core.perturb.native.build import build
from deepzero_core.perturb.rewriting.attention import attend, shares
from deepzero_core.perturb.rules.smooth import TERMS, coefficients

pytestmark = pytest.mark.skipif(build().library is None, reason=build().reason or "no kernels")

COUNT, STEP = 3, 1e-3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def differences(function: Callable[..., Tensor], bases: Any, changes: Any) -> Tensor:
    """f(y + δ) − f(y) in float64, for every perturbation; a change may be None."""
    wide = [base.double() for base in bases]
    found = []
    for p in range(COUNT):
        moved = [y if change is None else y + change[p] for y, change in zip(wide, changes, strict=True)]
        found.append(function(*moved) - function(*wide))
    return torch.stack(found)


def assert_close(found: Tensor | None, exact: Tensor) -> None:
    assert found is not None
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= 3e-6 * exact.abs().max()


def heads(batch: int, number: int, queries: int, keys: int, inner: int, features: int) -> tuple[Tensor, ...]:
    return (
        randn(batch, number, queries, inner),
        randn(batch, number, keys, inner, seed=1).mT,  # as a transpose of the keys lies in memory
        randn(batch, keys, number, features).transpose(1, 2),
    )


def moved(factor: Tensor, seed: int) -> Tensor:
    return STEP * torch.stack([randn(*factor.shape, seed=seed + p) for p in range(COUNT)])


SHAPES = [(2, 3, 5, 5, 4, 4), (1, 2, 1, 70, 16, 16), (2, 1, 33, 7, 3, 40), (1, 4, 65, 65, 16, 16)]


@pytest.mark.parametrize("moving", [m for m in product([True, False], repeat=3) if any(m)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape: tuple[int, ...], moving: tuple[bool, ...]) -> None:
    factors = heads(*shape)
    changes = tuple(
        moved(factor, 7 * i) if m else None for i, (factor, m) in enumerate(zip(factors, moving, strict=True))
    )
    base = dense.in_vectors(shares(factors[0], factors[1], 0.3))
    found = attention_change(factors, changes, base, 0.3, COUNT)
    assert_close(found, differences(lambda a, b, v: attend(a, b, v, 0.3), factors, changes))


def test_attention_of_heads_that_stay() -> None:
    factors = heads(*SHAPES[0])
    changes = tuple(moved(factor, i) for i, factor in enumerate(factors))
    for change in changes:
        change[:, :, 1:] = 0
    found = attention_change(factors, changes, dense.in_vectors(shares(*factors[:2], 1.0)), 1.0, COUNT)
    assert_close(found, differences(lambda a, b, v: attend(a, b, v, 1.0), factors, changes))
    assert found is not None
    assert not found[:, :, 1:].any()


@pytest.mark.parametrize("size", [2e3, float("nan")])
def test_attention_declines_large_scores(size: float) -> None:
    factors = heads(*SHAPES[0])
    change = moved(factors[0], 0)
    change[1, 1, 2, 3] *= size
    assert (
        attention_change(factors, (change, None, None), dense.in_vectors(shares(*factors[:2], 1.0)), 1.0, COUNT) is None
    )


@pytest.mark.parametrize(("rows", "inputs", "hidden", "outputs"), [(7, 5, 11, 3), (50, 64, 256, 64), (1, 1, 1, 1)])
@pytest.mark.parametrize("function", [F.gelu, torch.tanh], ids=["gelu", "tanh"])
def test_feed_forward(function: Callable[[Tensor], Tensor], rows: int, inputs: int, hidden: int, outputs: int) -> None:
    x, weight, weight_2 = randn(rows, inputs), randn(inputs, hidden), randn(hidden, outputs)
    delta, radius = moved(x, 0), 1 / 16
    known = coefficients(function, x @ weight, radius)
    packed = dense.in_vectors(weight), dense.in_vectors(weight_2)
    exact = differences(lambda y: function(y @ weight.double()) @ weight_2.double(), [x], [delta])
    assert_close(dense.feed_forward(delta, *packed, outputs, known, radius), exact)
    assert dense.feed_forward(1e3 * delta, *packed, outputs, known, radius) is None
    assert dense.feed_forward(float("nan") * delta, *packed, outputs, known, radius) is None


@pytest.mark.parametrize("radius", TERMS)
def test_polynomial(radius: float) -> None:
    y = randn(40, 70)
    delta = radius * randn(COUNT, 40, 70).tanh()
    exact = differences(F.gelu, [y], [delta])
    assert_close(dense.polynomial(delta, coefficients(F.gelu, y, radius)), exact)


@pytest.mark.parametrize("columns", [1, 5, 64, 100])
@pytest.mark.parametrize("gain", [True, False])
def test_layer_norm(columns: int, gain: bool) -> None:
    y, gamma = randn(2, 7, columns), randn(columns) if gain else None
    _, mean, scale = torch.native_layer_norm(y, [columns], gamma, None, 1e-5)
    delta = moved(y, 0)

    def normalised(value: Tensor) -> Tensor:
        return F.layer_norm(value, [columns], gamma.double() if gamma is not None else None)

    found = dense.layer_norm(delta, [0] * COUNT, y - mean, scale, gamma)
    exact = differences(normalised, [y], [delta])
    assert (found - exact).abs().max() <= 1e-5 * max(exact.abs().max(), STEP)


def test_layer_norm_of_blocks() -> None:
    y, gamma, starts, width = randn(2, 7, 20), randn(20), [0, 4, 17], 3
    _, mean, scale = torch.native_layer_norm(y, [20], gamma, None, 1e-5)
    block, whole = moved(y[..., :width], 0).contiguous(), torch.zeros(COUNT, *y.shape)
    for p, start in enumerate(starts):
        whole[p, ..., start : start + width] = block[p]
    found = dense.layer_norm(block, starts, y - mean, scale, gamma)
    assert_close(found, differences(lambda value: F.layer_norm(value, [20], gamma.double()), [y], [whole]))


def test_bits_depend_neither_on_threads_nor_on_how_many_are_computed_together() -> None:
    factors = heads(*SHAPES[3])
    changes = tuple(moved(factor, i) for i, factor in enumerate(factors))
    base, threads = dense.in_vectors(shares(*factors[:2], 1.0)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = attention_change(factors, changes, base, 1.0, COUNT)
        torch.set_num_threads(2)
        alone = [attention_change(factors, tuple(c[p : p + 1] for c in changes), base, 1.0, 1) for p in range(COUNT)]
    finally:
        torch.set_num_threads(threads)
    assert together is not None
    for p, one in enumerate(alone):
        assert one is not None
        assert torch.equal(together[p], one[0])
