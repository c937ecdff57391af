"""Whether convolutions are faster in bfloat16 on this machine, as `precision="bfloat16"` allows them to be.

Processors with the instructions differ: where pairs of bfloat16 are multiplied at the rate of floats they save half the
products; where that rate is lower, packing the pairs costs more than is saved.
"""

from ctypes import CDLL
from functools import cache
from pathlib import Path

from filelock import FileLock

from deepzero_core.durable import replacing
from deepzero_core.perturb.native.build import library
from deepzero_core.perturb.native.program import has_bfloat16

_REPEATS = 7


@cache
def bfloat16_pays() -> bool:
    """Measured once and kept beside the kernels: all processes of a machine have to decide alike, for the same bits."""
    return has_bfloat16() and gain() > 1


def gain() -> float:
    """How many times as fast as in float32 a convolution is in bfloat16."""
    kernels = library()
    assert kernels is not None
    kept = Path(kernels._name).with_suffix(".bfloat16")
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            with replacing(kept) as file:
                file.write(f"{_measured(kernels):.3f}\n".encode())
    return float(kept.read_text(encoding="ascii"))


def _measured(kernels: CDLL) -> float:
    turns = [[kernels.deepzero_winograd_seconds(bfloat16) for bfloat16 in (0, 1)] for _ in range(_REPEATS)]
    float32, bfloat16 = (min(times) for times in zip(*turns, strict=True))
    return float(float32 / bfloat16)
