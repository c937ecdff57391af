"""Noisy copies of one example, drawn in blocks of a fixed size.

torch fills long tensors in another order than short ones, so that the values of a draw depend on its size. Here every
draw has the same size, a function of the example's shape alone: copy i is row i mod b of draw ⌊i/b⌋, b copies a draw,
whatever numbers of copies are asked for. One draw of many copies is also several times faster than one per copy.
"""

import torch
from torch import Tensor

BLOCK = 1 << 14
"""Values per draw, at least: long enough that the call costs nothing beside it, short enough to hold one per example
where the copies of many share a batch."""


class NoisyCopies:
    """x + ε with ε ~ N(0, σ²I), one copy after the other; [count, *x.shape], x's dtype and device."""

    def __init__(self, x: Tensor, sigma: float, generator: torch.Generator) -> None:
        self._x, self._sigma, self._generator = x, sigma, generator
        self._block: Tensor | None = None
        self._used = 0

    def room(self, count: int) -> Tensor:
        """An empty tensor for `count` copies."""
        return self._x.new_empty(count, *self._x.shape)

    def write(self, out: Tensor) -> None:
        """Fill `out`, [count, *x.shape], with the next copies."""
        written = 0
        while written < len(out):
            if self._block is None or self._used == len(self._block):
                self._block, self._used = self._drawn(), 0
            count = min(len(self._block) - self._used, len(out) - written)
            # Two operations, each rounded: fused, the rounding would depend on where in the tensor a value stands.
            torch.add(self._x, self._block[self._used : self._used + count], out=out[written : written + count])
            self._used += count
            written += count

    def _drawn(self) -> Tensor:
        copies = max(1, -(-BLOCK // self._x.numel()))
        block = torch.empty(copies, *self._x.shape, dtype=self._x.dtype, device=self._generator.device)
        return block.normal_(0, self._sigma, generator=self._generator).to(self._x.device)
