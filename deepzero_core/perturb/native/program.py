"""Programs of the compiled kernels, and running them: `program.h` in Python. Everything is float32, on the CPU.

A *slice* is `lanes()` examples of one perturbation:

    base value   [B, C, *space]      in slices   [S, C, *space, lanes]       the last slice filled up with zeros
    change       [P, B, C, *space]   in slices   [P, S, C, *space, lanes]

Each slice is computed by one thread in one order, and sums over slices are taken in one order: the bits depend neither
on the number of threads nor on how many perturbations are evaluated together.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.perturb.native.build import library

WEIGHT, AFFINE, CONVOLVE, WINOGRAD, WINOGRAD_BFLOAT16, MOMENTS, CHAIN, MEAN, PLACE, ACTIVATE, AVERAGE = range(11)
SIGMOID, TANH, SILU, GELU, GELU_TANH, ELU, CLAMP, HARD_SIGMOID, HARD_SWISH = range(9)
TILED = (WINOGRAD, WINOGRAD_BFLOAT16)
"""Winograd's F(4×4, 3×3), and the same in bfloat16."""
LOCAL, SHARED, EXTERNAL = range(3)
NONE = -1

_FLOAT = 4
_CACHE = 4 << 20
"""Bytes of changes that a thread has in flight, where one perturbation has not more: what stays in ordinary caches."""

_Integer, _Floats = ctypes.c_int64, ctypes.c_void_p


def _named(kind: type[ctypes.c_int64 | ctypes.c_void_p], names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Shape(ctypes.Structure):
    """Channels, space and window of an operator; one axis of space has a missing height of 1 in front."""

    _fields_ = _named(
        _Integer,
        "channels outputs height width out_height out_width kernel_height kernel_width "
        "stride_h stride_w pad_h pad_w dilation_h dilation_w",
    )


class Buffer(ctypes.Structure):
    """A change of one slice: where it is kept, and whether it is that of one channel."""

    _fields_ = _named(_Integer, "storage offset channels length thin shift")


class Norm(ctypes.Structure):
    """A normalisation with the statistics of the batch."""

    _fields_ = _named(_Floats, "values mean scale gamma beta") + _named(
        _Integer, "source phase channels all_channels sums"
    )


class Step(ctypes.Structure):
    """One operator on one slice."""

    _fields_: ClassVar = [
        *_named(_Integer, "kind source residual target norm"),
        ("shape", Shape),
        *_named(_Floats, "weight values mean scale base"),
        *_named(_Integer, "values_channels base_channels rectify pool front groups group_channels function"),
        ("slope", ctypes.c_double),
        ("parameters", ctypes.c_float * 3),
    ]


class _Program(ctypes.Structure):
    _fields_ = _named(_Floats, "steps buffers norms phase_ends") + _named(
        _Integer, "phases norm_count slices batch local_floats shared_floats scratch_floats channels"
    )


@dataclass(frozen=True)
class Program:
    """Steps with their buffers laid out; `kept` holds on to the tensors whose addresses they carry."""

    steps: Sequence[Step]
    buffers: Sequence[Buffer]
    norms: Sequence[Norm]
    phase_ends: Sequence[int]
    batch: int
    local_floats: int
    shared_floats: int
    channels: int
    kept: Sequence[object] = field(repr=False, default=())

    @property
    def slices(self) -> int:
        return -(-self.batch // lanes())

    def group(self, threads: int) -> int:
        """Perturbations that are in flight at once: as the caches hold, and enough for every thread to have a slice."""
        each = max(1, _FLOAT * self.slices * self.shared_floats)
        return max(1, threads * _CACHE // each, -(-threads // self.slices))

    @cached_property
    def _scratch(self) -> int:
        """Floats that one thread's operators need for themselves."""
        return max((_scratch(step) for step in self.steps), default=0)

    @cached_property
    def _compiled(self) -> _Program:
        """As the kernels read it; the structure keeps its arrays alive."""
        arrays = (
            _array(Step, self.steps), _array(Buffer, self.buffers), _array(Norm, self.norms),
            _array(_Integer, self.phase_ends),
        )  # fmt: skip
        return _Program(
            *(ctypes.cast(array, _Floats) for array in arrays),
            len(self.phase_ends), len(self.norms), self.slices, self.batch,
            self.local_floats, self.shared_floats, self._scratch, self.channels,
        )  # fmt: skip

    def run(self, moved: Tensor, steps: Tensor, external: Sequence[Tensor]) -> None:
        """Evaluate perturbations.

        Args:
            moved: int64 [P, 4], the perturbed channel and, of a convolution's weight, input channel, row and column.
            steps: float32 [P], by how much it moves.
            external: what enters and leaves, in slices; the latter is written.
        """
        kernels = library()
        assert kernels is not None
        threads = torch.get_num_threads()
        group = min(self.group(threads), len(moved))
        local = torch.empty(threads, self.local_floats + self._scratch)
        shared = torch.empty(group * self.slices * self.shared_floats)
        pointers = (_Floats * len(external))(*(tensor.data_ptr() for tensor in external))
        kernels.deepzero_run(
            ctypes.byref(self._compiled), _Floats(moved.data_ptr()), _Floats(steps.data_ptr()), _Integer(len(moved)),
            _Integer(group), _Floats(local.data_ptr()), _Floats(shared.data_ptr()), pointers, threads,
        )  # fmt: skip


def _scratch(step: Step) -> int:
    kernels = library()
    assert kernels is not None
    if step.kind not in (CONVOLVE, *TILED):
        return 0
    return int(kernels.deepzero_scratch(ctypes.byref(step.shape), int(step.kind != CONVOLVE)))


def _array(kind: Any, items: Sequence[Any]) -> Any:
    return (kind * len(items))(*items)


def lanes() -> int:
    """Examples in a slice."""
    kernels = library()
    return int(kernels.lanes()) if kernels is not None else 0


def has_bfloat16() -> bool:
    """Whether this machine has instructions for products in bfloat16."""
    kernels = library()
    return kernels is not None and bool(kernels.has_bfloat16())


def suits(value: Tensor) -> bool:
    """Whether programs take base values like this, [B, C, *space]: one or two axes of space, half a slice or more."""
    return (
        value.ndim in (3, 4)
        and value.dtype == torch.float32
        and value.device.type == "cpu"
        and value.numel() > 0
        and library() is not None
        and 2 * value.shape[0] >= lanes()
    )


def in_slices(value: Tensor, batch_axis: int = 0) -> Tensor:
    """[…, B, C, *space] → […, S, C, *space, lanes]."""
    batch = value.movedim(batch_axis, -1)
    missing = -batch.shape[-1] % lanes()
    filled: Tensor = F.pad(batch, (0, missing)) if missing else batch
    sliced: Tensor = filled.unflatten(-1, (-1, lanes())).movedim(-2, batch_axis)
    return sliced.contiguous()


def from_slices(sliced: Tensor, batch: int, batch_axis: int = 0) -> Tensor:
    """The inverse of `in_slices`."""
    whole: Tensor = sliced.movedim(-1, batch_axis + 1).flatten(batch_axis, batch_axis + 1)
    return whole.narrow(batch_axis, 0, batch)


def pack(weight: Tensor, groups: int = 1) -> Tensor:
    """W [O, C, *k] as CONVOLVE reads it, O and C of every group: [groups, C, *k, O]."""
    grouped: Tensor = weight.unflatten(0, (groups, -1)).movedim(1, -1)
    return grouped.contiguous()


def pack_winograd(weight: Tensor, kind: int) -> Tensor:
    """U = G W Gᵀ of W [O, C, 3, 3] as [36, C, O]; for bfloat16 as [36, C/2, O] pairs of channels.

    Row p of G is (1, p, p²)/Π(p − p') over the other points p', and (0, 0, 1) at infinity.
    """
    a, b = 3 / 4, 3 / 2
    points = [0, a, -a, b, -b]
    scales = [1 / prod(p - other for other in points if other != p) for p in points]
    rows = [[scale * p**k for k in range(3)] for p, scale in zip(points, scales, strict=True)]
    transform = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    values = torch.einsum("ar,ocrs,bs->abco", transform, weight.double(), transform).flatten(0, 1).float()
    if kind == WINOGRAD:
        return values.contiguous()
    pairs: Tensor = values.unflatten(1, (-1, 2)).movedim(2, -1).bfloat16().contiguous()
    return pairs.view(torch.float32).squeeze(-1)
