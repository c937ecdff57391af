"""The kernels on tensors. Everything is float32, on the CPU, and *batch-last* in memory:

    base value   logical [B, C, *space]      memory [C, *space, B]
    change       logical [P, B, C, *space]   memory [P, C, *space, B]

so that every operator is the same arithmetic on whole vectors of examples, whatever its channels and windows, and every
statistic of a channel is a sum over one contiguous run. A tensor that lies otherwise is copied first.

Each perturbation is computed by one thread in one order: the bits do not depend on the number of threads.
"""

import ctypes
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.native.build import library

_Floats = ctypes.c_void_p
Window = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
"""Kernel, stride, padding, dilation and size of the result, per axis of space."""


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "channels", "outputs", "height", "width", "out_height", "out_width", "kernel_height", "kernel_width",
            "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "batch",
        )
    ]  # fmt: skip


class _Chain(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("channels", "length", "batch")],
        *[(name, _Floats) for name in ("delta", "values", "residual", "base", "a", "c", "d", "mean", "start")],
        ("slope", ctypes.c_float),
        ("out", _Floats),
    ]


def suits(delta: Tensor) -> bool:
    """Whether the kernels take this change [P, B, C, *space]: one or two axes of space, a batch that fills a vector."""
    return (
        delta.ndim in (4, 5)
        and delta.dtype == torch.float32
        and delta.device.type == "cpu"
        and delta.numel() > 0
        and library() is not None
        and delta.shape[1] >= _lanes()
    )


def has_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 faster than float32."""
    kernels = library()
    return kernels is not None and bool(kernels.has_bfloat16())


def _lanes() -> int:
    kernels = library()
    return int(kernels.lanes()) if kernels is not None else 0


def batch_last(value: Tensor, batch_axis: int = 1) -> Tensor:
    """The same tensor with its batch axis innermost in memory; a copy only where it lies otherwise."""
    return value.movedim(batch_axis, -1).contiguous().movedim(-1, batch_axis)


def _empty(delta: Tensor, channels: int, space: Sequence[int]) -> Tensor:
    count, batch = delta.shape[:2]
    return torch.empty(count, channels, *space, batch).movedim(-1, 1)


def _two(values: Sequence[int], missing: int) -> list[int]:
    """One- and two-dimensional space alike: a missing height in front."""
    return [missing] * (2 - len(values)) + list(values)


def _shape(channels: int, outputs: int, space: Sequence[int], window: Window, batch: int) -> _Shape:
    kernel, stride, padding, dilation, out_space = window
    taps = (*_two(kernel, 1), *_two(stride, 1), *_two(padding, 0), *_two(dilation, 1))
    return _Shape(channels, outputs, *_two(space, 1), *_two(out_space, 1), *taps, batch)


def _address(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def _starts(count: int, start: Sequence[int] | None) -> Tensor:
    return torch.tensor(start, dtype=torch.int64) if start is not None else torch.zeros(count, dtype=torch.int64)


def pack(weight: Tensor, bfloat16: bool) -> Tensor:
    """W [O, C, *k] as `convolve` reads it: [C, *k, O], or [⌈C/2⌉, *k, O] pairs of bfloat16."""
    packed = weight.movedim(0, -1).contiguous()
    return _paired(packed) if bfloat16 else packed


def pack_winograd(weight: Tensor) -> Tensor:
    """U = G W Gᵀ of W [O, C, 3, 3], as [36, C, O]. Row p of G is (1, p, p²)/Π(p − p') over the other points p'."""
    a, b = 3 / 4, 3 / 2
    points = [0, a, -a, b, -b]
    scales = [1 / prod(p - other for other in points if other != p) for p in points]
    rows = [[scale * p**k for k in range(3)] for p, scale in zip(points, scales, strict=True)]
    transform = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    values = torch.einsum("ar,ocrs,bs->abco", transform, weight.double(), transform)
    return values.float().flatten(0, 1).contiguous()


def _paired(weight: Tensor) -> Tensor:
    """[C, …] → [⌈C/2⌉, …]: channels 2i and 2i + 1 as bfloat16 in the halves of one float's bits."""
    if len(weight) % 2:
        weight = torch.cat([weight, torch.zeros_like(weight[:1])])
    pairs = weight.unflatten(0, (-1, 2)).movedim(1, -1).bfloat16().contiguous()
    merged: Tensor = pairs.view(torch.float32)
    return merged.squeeze(-1)


def convolve(
    delta: Tensor,
    weight: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_space: Sequence[int],
    *,
    start: Sequence[int] | None = None,
    winograd: bool = False,
    bfloat16: bool = False,
) -> Tensor:
    """Δ = W ∗ δ: δ [P, B, C, *space] → [P, B, O, *out_space].

    `weight` is packed by `pack` or, for a 3×3 kernel of stride and dilation 1, by `pack_winograd`. With `start` δ holds
    one channel, number start[p] of the weight.
    """
    kernels = library()
    assert kernels is not None
    delta = batch_last(delta)
    count, batch, channels, *space = delta.shape
    outputs = weight.shape[-1]
    shape = _shape(channels, outputs, space, (kernel, stride, padding, dilation, out_space), batch)
    out = _empty(delta, outputs, out_space)
    threads = torch.get_num_threads()
    if winograd:
        kernels.deepzero_winograd(
            ctypes.byref(shape), *_pointers(delta, weight), ctypes.c_int64(count), *_pointers(out), threads
        )
        return out
    if bfloat16:
        length = prod(space) * batch
        pairs = torch.empty(count, (channels + 1) // 2, length)
        kernels.deepzero_pair_channels(
            *_pointers(delta), *map(ctypes.c_int64, (count, channels, length)), *_pointers(pairs), threads
        )
        shape.channels, delta = (channels + 1) // 2, pairs
    starts = _starts(count, start)
    run = kernels.deepzero_convolve_bfloat16 if bfloat16 else kernels.deepzero_convolve
    run(ctypes.byref(shape), *_pointers(delta, weight, starts), ctypes.c_int64(count), *_pointers(out), threads)
    return out


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def moments(delta: Tensor, values: Tensor, mean: Tensor | None, start: Sequence[int] | None) -> Tensor:
    """The means of δ and (2x̂ + δ)·δ over space and batch, [P, C, 2].

    x̂ = values − mean; values [B, channels, *space] and mean [channels] are read from channel start[p].
    """
    kernels = library()
    assert kernels is not None
    delta, values = batch_last(delta), batch_last(values, 0)
    out = torch.empty(delta.shape[0], delta.shape[2], 2)
    starts = _starts(delta.shape[0], start)
    chain = _chain(delta, out, start=starts, values=values, mean=mean)
    kernels.deepzero_moments(ctypes.byref(chain), ctypes.c_int64(delta.shape[0]), torch.get_num_threads())
    return out


def _chain(delta: Tensor, out: Tensor, *, slope: float = 0.0, **values: Tensor | None) -> _Chain:
    _, batch, channels, *space = delta.shape
    addresses: dict[str, Any] = {name: _address(value) for name, value in values.items()}
    return _Chain(
        channels=channels, length=prod(space), batch=batch, delta=delta.data_ptr(), slope=slope, out=out.data_ptr(),
        **addresses,
    )  # fmt: skip


def chain(
    delta: Tensor,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    rescale: Tensor | None,
    values: Tensor | None,
    mean: Tensor | None,
    residual: Tensor | None,
    base: Tensor | None,
    slope: float | None,
    start: Sequence[int] | None,
    pool: Window | None = None,
) -> Tensor:
    """scale·δ + shift + rescale·(values − mean) + residual, then the rectifier's difference and max-pooling's.

    delta, residual:       [P, B, C, *space]
    scale, shift, rescale: [P, C]
    values, base:          [B, channels, *space], batch-last; read from channel start[p], as is mean [channels]. `base`
                           is what the rectifier, or the pooling where there is none, has as its operand.
    slope:                 of the rectifier for negative values; None: no rectifier
    pool:                  of the max-pooling; None: none
    """
    kernels = library()
    assert kernels is not None
    delta = batch_last(delta)
    count, batch, channels, *space = delta.shape
    residual = None if residual is None else batch_last(residual)
    out = _empty(delta, channels, pool[4] if pool else space)
    starts = _starts(count, start)
    coefficients = [None if value is None else value.contiguous() for value in (scale, shift, rescale)]
    work = _chain(
        delta, out, slope=slope or 0.0, start=starts, values=values, mean=mean, residual=residual, base=base,
        a=coefficients[0], c=coefficients[1], d=coefficients[2],
    )  # fmt: skip
    shape = None
    if pool:
        shape = ctypes.byref(_shape(channels, channels, space, pool, batch))
    kernels.deepzero_chain(
        ctypes.byref(work), shape, int(slope is not None), ctypes.c_int64(count), torch.get_num_threads()
    )
    return out
