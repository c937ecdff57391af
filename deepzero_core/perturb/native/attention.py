"""The kernel of attention: `attention.h` in Python. Everything is float32, on the CPU."""

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepzero_core.perturb.native.build import library

_Integer, _Floats = ctypes.c_int64, ctypes.c_void_p


class _Operand(ctypes.Structure):
    _fields_: ClassVar = [
        ("base", _Floats),
        ("change", _Floats),
        ("strides", _Integer * 4),
        ("moved", _Integer * 5),
    ]


class _Attention(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, _Integer) for name in ("count", "batch", "heads", "rows", "inner", "keys", "features")),
        *((name, _Operand) for name in ("a", "b", "v")),
        ("shares", _Floats),
        ("out", _Floats),
        ("scale", ctypes.c_double),
    ]


def suits(value: Tensor) -> bool:
    """Whether the kernel takes values like this."""
    return value.dtype == torch.float32 and value.device.type == "cpu" and value.numel() > 0 and library() is not None


def attention_change(
    factors: tuple[Tensor, Tensor, Tensor],
    changes: tuple[Tensor | None, Tensor | None, Tensor | None],
    shares: Tensor,
    scale: float,
    count: int,
) -> Tensor | None:
    """The change of attention, [P, B, H, M, E]; None where some score moves by more than 1.

    Args:
        factors: a [B, H, M, K], b [B, H, K, L] and v [B, H, L, E].
        changes: theirs, [P, …]; None where one does not move.
        shares: softmax(scale·a·b), [B, H, M, L]; see `dense.in_vectors`.
        scale: of a·b.
        count: P.
    """
    a, _, v = factors
    batch, heads, rows, inner = a.shape
    keys, features = v.shape[2:]
    out = a.new_empty(count, batch, rows, heads, features)
    operands = [_operand(factor, change) for factor, change in zip(factors, changes, strict=True)]
    sizes: list[Any] = [count, batch, heads, rows, inner, keys, features]
    call = _Attention(*sizes, *operands, shares.data_ptr(), out.data_ptr(), scale)
    kernels = library()
    assert kernels is not None
    within = kernels.deepzero_attend(ctypes.byref(call), torch.get_num_threads())
    return out.transpose(2, 3) if within else None


def _operand(factor: Tensor, change: Tensor | None) -> _Operand:
    moved = (0,) * 5 if change is None else change.stride()
    address = None if change is None else change.data_ptr()
    return _Operand(factor.data_ptr(), address, (_Integer * 4)(*factor.stride()), (_Integer * 5)(*moved))
