"""What this machine can do at most, measured: the yardstick of predictions and shares of the peak. And how exactly."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

_SIZE = 1024
"""Of the square matrices that are multiplied: 12 MiB in all, 2 GFLOP."""
_STREAM_BYTES = 64 << 20
_REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """Peaks with `threads` threads: floating-point operations and bytes of memory traffic per second.

    start: seconds that Python and torch take for the change of an operator's result, however small.
    """

    threads: int
    flops: float
    bandwidth: float
    start: float = 0.0


NOMINAL = Machine(1, 80e9, 15e9, 1e-4)
"""One core of an ordinary server: for plans that must be the same on every machine."""


def measured() -> Machine:
    """The peaks for torch's present number of threads; a few tenths of a second the first time."""
    return _measured(torch.get_num_threads())


@cache
def _measured(threads: int) -> Machine:
    a, b = torch.ones(_SIZE, _SIZE), torch.ones(_SIZE, _SIZE)
    product = torch.empty(_SIZE, _SIZE)
    stream = torch.ones(_STREAM_BYTES // 4)
    moved = torch.empty_like(stream)
    flops = 2 * _SIZE**3 / _fastest(lambda: torch.mm(a, b, out=product))
    bandwidth = 2 * _STREAM_BYTES / _fastest(lambda: torch.mul(stream, 2, out=moved))
    return Machine(threads, flops, bandwidth, _start())


def _start() -> float:
    """Measured on a network that is too small for anything else to count."""
    from deepzero_core.perturb.evaluator import Chunk, prepare
    from deepzero_core.perturb.objective import state_of

    convolution, linear = skip_init(nn.Conv2d, 1, 4, 3), skip_init(nn.Linear, 16, 4)
    module = nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), linear)
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.1)
    inputs, targets = torch.linspace(0, 1, 16 * 16).view(16, 1, 4, 4), torch.zeros(16, dtype=torch.long)
    evaluator = prepare(module, inputs, targets, F.cross_entropy)
    problem = (*state_of(module), inputs, targets)
    chunk = Chunk("0.bias", torch.arange(4))
    starts = evaluator.starts(evaluator.base(*problem), chunk.name, 1)
    # A fresh base pass each time, as every estimate has one: what is made once for it counts.
    passes = iter([evaluator.base(*problem) for _ in range(_REPEATS)])
    return _fastest(lambda: evaluator.coordinates(next(passes), chunk, 1e-3)) / starts


def _fastest(run: Callable[[], object]) -> float:
    """Seconds: the best of a few, since whatever disturbs a measurement makes it slower."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Float32 products without TF32, whose ten bits of mantissa cannot hold a difference.

    On a CUDA device cuDNN takes TF32 unless it is told otherwise. Who has asked for it by
    `torch.set_float32_matmul_precision` gets it.
    """
    if device.type != "cuda" or torch.get_float32_matmul_precision() != "highest":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
