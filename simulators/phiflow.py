"""PhiFlow, made fast: simulations in a batch dimension, each step traced once for each number of them.

PhiFlow spends milliseconds of Python on a step whatever its size: simulations are advanced together, and the step is
compiled (`math.jit_compile`). A trace holds for one batch size; sizes are rounded up to powers of two, and what is
too much is computed and dropped. Neither changes a bit of any simulation.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor

LOCK = RLock()
"""PhiFlow keeps the precision and the trace in progress in global variables: one thread at a time."""


@functools.cache
def flow() -> Any:
    """The module `phi.torch.flow`, imported when first needed: it takes a second. Its `import *` would hide `round`."""
    with quiet():
        import phi.torch.flow

    return phi.torch.flow


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that are phiml's own affair."""
    with warnings.catch_warnings():
        # numpy.core and torch.jit, which phiml 1.16 is built on, are deprecated and work.
        warnings.simplefilter("ignore", DeprecationWarning)
        # torch says of its sparse matrices, with which phiml solves, that they are in beta and unchecked.
        warnings.filterwarnings("ignore", "Sparse (invariant checks|CSR tensor support)", UserWarning)
        yield


def wrap(value: Tensor) -> Any:
    """[N], [N, Y, X] or [N, 2, Y, X] as PhiFlow's tensor with the dimensions n, (vector,) y and x."""
    phi = flow()
    if value.ndim == 1:
        return phi.tensor(value, phi.batch("n"))
    return phi.tensor(value, phi.batch("n"), phi.spatial("y,x"))


def unwrap(value: Any) -> Tensor:
    """PhiFlow's tensor with dimensions n, y and x as [N, Y, X]."""
    native: Tensor = value.native("n,y,x")
    return native


class Compiled:
    """A function of PhiFlow's tensors as one of torch's, compiled for each batch size and type that it meets.

    function: tensors with dimensions n or n, y, x → as many as it likes with dimensions n, y, x; pure. Constants that
    it closes over are wrapped numpy arrays, which take the type of what they meet.
    Differentiable by torch. Fit for pickling where the function is; a copy is traced anew.
    """

    def __init__(self, function: Callable[..., Sequence[Any]]) -> None:
        self.function = function
        self._traces: dict[tuple[int, torch.dtype], Callable[..., Sequence[Any]]] = {}

    def __reduce__(self) -> tuple[type["Compiled"], tuple[Callable[..., Sequence[Any]]]]:
        return Compiled, (self.function,)

    def __call__(self, *values: Tensor) -> list[Tensor]:
        """[N] or [N, Y, X] each, of one type, float32 or float64 → [N, Y, X] each."""
        size = len(values[0])
        padded = 1 << (size - 1).bit_length()
        rows = torch.arange(padded).clamp(max=size - 1)
        if padded != size:
            values = tuple(value[rows] for value in values)
        key = (padded, values[0].dtype)
        with LOCK, quiet(), _precision(values[0]):
            if key not in self._traces:
                self._traces[key] = _traced(self.function, values)
            return [part[:size] for part in _natively(self._traces[key], values)]


def run(function: Callable[..., Sequence[Any]], *values: Tensor) -> list[Tensor]:
    """The function as PhiFlow runs it, operator by operator: what `Compiled` must equal."""
    with LOCK, quiet(), _precision(values[0]):
        return _natively(function, values)


def _natively(function: Callable[..., Sequence[Any]], values: Sequence[Tensor]) -> list[Tensor]:
    return [unwrap(part) for part in function(*map(wrap, values))]


def _traced(function: Callable[..., Sequence[Any]], values: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
    """The function compiled for arguments like these."""
    compiled: Callable[..., Sequence[Any]] = flow().math.jit_compile(function)
    # A trace remembers of what it first meets whether it needed a gradient: that must not. And in the midst of an
    # operator of torch, as a black box is, nothing can be traced: what says so belongs to the thread.
    with ThreadPoolExecutor(1) as other:
        other.submit(_natively, compiled, [value.detach() for value in values]).result()
    return compiled


def _precision(value: Tensor) -> AbstractContextManager[None]:
    """What PhiFlow creates meanwhile is of the type of `value`."""
    context: AbstractContextManager[None] = flow().math.precision(torch.finfo(value.dtype).bits)
    return context
