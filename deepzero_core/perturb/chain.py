"""Changes that are written down first and evaluated once: what follows a convolution, in one pass over memory.

    e = scale·δ + shift + rescale·(values − mean) + residual    normalisation and residual sum
    rectified:  Δ = max(e + min(y, 0), −max(y, 0))              with slope s:  Δ + s·(e − Δ)
    pooled:     e = maxⱼ(eⱼ + (yⱼ − m)) and y = m = maxⱼ yⱼ      before the rectifier (both are monotone and commute)

Nothing cancels: where signs and arg-max stay, Δ is e itself. Rules extend an open chain; reading `delta` closes it.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deepzero_core.perturb.changes import Block, Change, dense, take
from deepzero_core.perturb.native import kernels
from deepzero_core.perturb.native.kernels import Window


@dataclass(frozen=True)
class Terms:
    """δ and residual [P, B, w, *space]; coefficients [P or 1, w]; base values [B, C, *space] of every channel."""

    source: Tensor
    block: Block | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    rescale: Tensor | None = None
    values: Tensor | None = None
    mean: Tensor | None = None
    residual: Tensor | None = None
    base: Tensor | None = None
    slope: float | None = None

    @property
    def native(self) -> bool:
        return kernels.suits(self.source) and (self.block is None or self.block.dim == 1)


class Chain(Change):
    """A change whose value is computed when it is first asked for."""

    def __init__(self, terms: Terms) -> None:
        object.__setattr__(self, "_open", terms)
        object.__setattr__(self, "block", terms.block)
        object.__setattr__(self, "_shape", terms.source.shape)

    @property
    def terms(self) -> Terms | None:
        """What is still to be evaluated; None once it has been."""
        found: Terms | None = self.__dict__["_open"]
        return found

    @cached_property
    def delta(self) -> Tensor:
        terms = self.terms
        assert terms is not None
        object.__setattr__(self, "_open", None)
        return _evaluate(terms)

    @property
    def count(self) -> int:
        return int(self.__dict__["_shape"][0])

    @property
    def width(self) -> int:
        assert self.block is not None
        return int(self.__dict__["_shape"][1 + self.block.dim])


def terms_of(change: Change) -> Terms:
    """An open chain that takes more terms, or a new one that starts from the change."""
    if isinstance(change, Chain) and change.terms is not None and change.terms.slope is None:
        return change.terms
    return Terms(change.delta, change.block)


def added(a: Change, b: Change, shape: torch.Size) -> Chain | None:
    """The sum of two changes of values [*shape], one an open chain that takes a residual; None where neither does."""
    if a is b:
        return None
    for chain, other in ((a, b), (b, a)):
        terms = chain.terms if isinstance(chain, Chain) else None
        if terms and terms.slope is None and terms.residual is None and terms.block in (None, other.block):
            return Chain(replace(terms, residual=other.delta if other.block == terms.block else dense(other, shape)))
    return None


def rectified(change: Change, base: Tensor, slope: float = 0.0) -> Chain:
    """Behind a (leaky) ReLU whose operand has the base values `base`."""
    return Chain(replace(terms_of(change), base=base, slope=slope))


def pooled(change: Change, base: Tensor, window: Window) -> Change | None:
    """Behind max-pooling; None where no kernel takes it."""
    terms = change.terms if isinstance(change, Chain) and change.terms else Terms(change.delta, change.block)
    if not terms.native:
        return None
    if terms.slope is None:
        terms = replace(terms, base=base)
    return Change(_native(terms, window), terms.block)


def base_layout(base: Tensor) -> Tensor:
    """Base values [B, …] laid out in memory as what changes them is best read."""
    return kernels.batch_last(base, 0) if kernels.suits(base.unsqueeze(0)) else base


def centred(values: Tensor, mean: Tensor | None, block: Block | None, width: int) -> Tensor:
    """The part of values [B, C, *space] − mean [C] that a block of channels covers; see `take`."""
    taken = take(values, block, width)
    if mean is None:
        return taken
    means = take(mean, Block(0, block.start) if block else None, width)
    return taken - means.reshape(len(means), 1, -1, *[1] * (values.ndim - 2))


def _evaluate(terms: Terms) -> Tensor:
    return _native(terms, None) if terms.native else _eager(terms)


def _native(terms: Terms, window: Window | None) -> Tensor:
    shape = terms.source.shape

    def per_perturbation(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.expand(shape[0], shape[2])

    def base(values: Tensor | None) -> Tensor | None:
        return None if values is None else kernels.batch_last(values, 0)

    return kernels.chain(
        terms.source,
        scale=per_perturbation(terms.scale),
        shift=per_perturbation(terms.shift),
        rescale=per_perturbation(terms.rescale),
        values=base(terms.values),
        mean=terms.mean,
        residual=terms.residual,
        base=base(terms.base),
        slope=terms.slope,
        start=terms.block.start if terms.block else None,
        pool=window,
    )


def _eager(terms: Terms) -> Tensor:
    rank = terms.source.ndim
    block, width = terms.block, terms.source.shape[1 + terms.block.dim] if terms.block else 0

    def channels(values: Tensor | None) -> Any:
        return 0 if values is None else values.reshape(values.shape[0], 1, -1, *[1] * (rank - 3))

    total = terms.source if terms.scale is None else channels(terms.scale) * terms.source
    if terms.shift is not None:
        total = total + channels(terms.shift)
    if terms.rescale is not None and terms.values is not None:
        total = torch.addcmul(total, channels(terms.rescale), centred(terms.values, terms.mean, block, width))
    if terms.residual is not None:
        total = total + terms.residual
    if terms.slope is None or terms.base is None:
        return total
    negative, positive = terms.base.clamp(max=0), terms.base.clamp(min=0)
    rectified = torch.maximum(total + take(negative, block, width), -take(positive, block, width))
    return rectified if terms.slope == 0 else rectified + terms.slope * (total - rectified)
