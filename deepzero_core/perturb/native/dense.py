"""Kernels for changes of whole tensors: `dense.h` in Python. Everything is float32, on the CPU."""

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.perturb.native.build import library

_Integer, _Floats = ctypes.c_int64, ctypes.c_void_p


class _FeedForward(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _Integer) for name in ("count", "rows", "inputs", "hidden", "outputs", "terms")),
        *((name, _Floats) for name in ("delta", "first", "second", "coefficients")),
        ("radius", ctypes.c_double),
        ("out", _Floats),
    ]


class _LayerNorm(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _Integer) for name in ("count", "rows", "columns", "width")),
        *((name, _Floats) for name in ("starts", "delta", "centred", "scale", "gain", "out")),
    ]


def suits(*values: Tensor) -> bool:
    """Whether the kernels take values like these."""
    fits = all(v.dtype == torch.float32 and v.device.type == "cpu" and v.numel() and v.is_contiguous() for v in values)
    return fits and library() is not None


def polynomial(delta: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """δ·(c₀ + c₁·δ + … + cₙ₋₁·δⁿ⁻¹), 2 ≤ n ≤ 12.

    Args:
        delta: [P, *s].
        coefficients: c₀ … cₙ₋₁, [*s] each.
    """
    kernels, out = library(), torch.empty_like(delta)
    assert kernels is not None
    pointers = (_Floats * len(coefficients))(*(coefficient.data_ptr() for coefficient in coefficients))
    kernels.deepzero_polynomial(
        _Floats(delta.data_ptr()), pointers, _Integer(len(coefficients)), _Integer(len(delta)),
        _Integer(coefficients[0].numel()), _Floats(out.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return out


def layer_norm(delta: Tensor, starts: Sequence[int], centred: Tensor, scale: Tensor, gain: Tensor | None) -> Tensor:
    """The change of a layer normalisation, [P, *s]; see `rules.layer_norm`.

    Args:
        delta: [P, *s], the change of what is normalised over its last axes; or of a block along the last of them.
        starts: where the block begins, P numbers.
        centred: [*s], y − m.
        scale: (v + ε)^−½ of every group.
        gain: γ, of the axes that are normalised; None: 1.
    """
    kernels, count = library(), len(delta)
    assert kernels is not None
    out, rows = delta.new_empty(count, *centred.shape), scale.numel()
    columns, width = centred.numel() // rows, delta.numel() // (count * rows)
    first = (_Integer * count)(*starts)
    addresses = [delta.data_ptr(), centred.data_ptr(), scale.data_ptr(), gain.data_ptr() if gain is not None else None]
    call = _LayerNorm(count, rows, columns, width, ctypes.cast(first, _Floats), *addresses, out.data_ptr())
    kernels.deepzero_layer_norm(ctypes.byref(call), torch.get_num_threads())
    return out


def feed_forward(
    delta: Tensor, first: Tensor, second: Tensor, outputs: int, coefficients: Sequence[Tensor], radius: float
) -> Tensor | None:
    """The change of f(x·W + c)·W₂ + c₂, [P, M, E]; None where some value between the products moves by more than r.

    Args:
        delta: [P, M, K], the change of x.
        first, second: W [K, N] and W₂ [N, E], see `in_vectors`.
        outputs: E.
        coefficients: of f, [M, N] each; see `polynomial`.
        radius: r, up to which they hold.
    """
    kernels, (count, rows, inputs) = library(), delta.shape
    assert kernels is not None
    out = delta.new_empty(count, rows, outputs)
    pointers = (_Floats * len(coefficients))(*(coefficient.data_ptr() for coefficient in coefficients))
    call = _FeedForward(
        count, rows, inputs, coefficients[0].shape[1], outputs, len(coefficients),
        delta.data_ptr(), first.data_ptr(), second.data_ptr(), ctypes.cast(pointers, _Floats), radius, out.data_ptr(),
    )  # fmt: skip
    return out if kernels.deepzero_feed_forward(ctypes.byref(call), torch.get_num_threads()) else None


def in_vectors(matrix: Tensor) -> Tensor:
    """A matrix with rows filled up with zeros to whole vectors, as products read them."""
    kernels = library()
    assert kernels is not None
    return F.pad(matrix, (0, -matrix.shape[-1] % int(kernels.lanes()))).contiguous()
