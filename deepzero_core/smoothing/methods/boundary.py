"""Zeroth-order gradients at the boundary of a black box, for each example of a batch by itself.

    RGE   gᵢ = (1/q) Σₖ [l(zᵢ + μuᵢₖ) − l(zᵢ)]/μ · uᵢₖ,   uᵢₖ ~ N(0, I), each example its own
    CGE   gᵢ = Σⱼ [l(zᵢ + μeⱼ) − l(zᵢ)]/μ · eⱼ            over n coordinates: all of them, or n drawn for each example

Where there are more queries than coordinates, CGE asks again, in rounds over all coordinates: from the other side,
which makes the differences central, and then at smaller steps (`deepzero_core.estimators.stencil`); the coordinates of
a last round that is not full are drawn for each example.

z: [B, …]; gradients: [B, …]. Losses are taken in float64 from the answers. A query is one evaluation of the loss on
the whole batch, that is B examples asked of the black box. P queries are one question of P·B examples.

A small μ drowns in the rounding of float32 answers, a large one meets the kinks of a rectifier network. Relative error
of the denoiser's gradient, digits, DnCNN of depth 5 and width 16 and an autoencoder of latent 24 (root mean square
1.1), against backpropagation:

    μ                                  1e-5    1e-4    3e-4    1e-3    3e-3    1e-2
    ZO-DS, CGE, all 64 pixels         5.2e-2  8.9e-3  1.3e-2  2.9e-2  6.5e-2  2.0e-1
    ZO-DS, RGE, 1,152 queries         2.2e-1  2.2e-1  2.2e-1  2.2e-1  2.3e-1  2.6e-1
    ZO-AE-DS, CGE, the whole latent   1.2e-1  1.2e-2  4.4e-3  4.8e-3  8.7e-3  1.9e-2
    DeepZero-split, all cosines       4.6e-2  5.1e-3  5.4e-3  1.5e-2  3.0e-2  6.2e-2
    DeepZero, 60 weights per layer    2.0e-2  7.7e-3  2.0e-2  4.1e-2  8.8e-2  1.9e-1    (μ of the weights)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.errors import RequestError, suggest
from deepzero_core.estimators.stencil import Stencil
from deepzero_core.perturb.estimate import check_arguments

ESTIMATORS = ("rge", "cge")
QUERIES = 1152
"""Queries of a step, DeepZero's of the black-box defence."""

_MEMORY = 32 << 20

Losses = Callable[[Tensor, Tensor], Tensor]
"""(values [N, …], owners [N]) → losses [N] in float64; owners: whose example of the batch each value is."""


@dataclass(frozen=True)
class Estimator:
    """How a step's queries become a gradient at the boundary.

    queries: what a step spends, the base one included: all of them, or all but one where the central difference does
    not come out even. difference: of "cge", how it begins, forward or on both sides of a coordinate at once.

    RequestError: unknown estimator or difference, μ not positive, queries that do not pay for one slope.
    """

    name: str = "rge"
    queries: int = QUERIES
    mu: float = 3e-4
    difference: str = "forward"

    def __post_init__(self) -> None:
        if self.name not in ESTIMATORS:
            raise RequestError(f"unknown estimator {self.name!r}: {suggest(self.name, ESTIMATORS)}")
        check_arguments(self.mu, self.difference)
        if self.queries < 1 + self._each:
            raise RequestError(
                f"queries of a step must be at least {1 + self._each} for a {self.difference} difference, "
                f"not {self.queries}"
            )

    @property
    def _each(self) -> int:
        return 2 if self.difference == "central" else 1

    @property
    def slopes(self) -> int:
        """Directions of a step, or coordinates, with those that come again counted again."""
        return (self.queries - 1) // self._each

    @property
    def cost(self) -> int:
        """Queries of a step, the base one included."""
        return 1 + self.slopes * self._each

    def gradient(
        self, losses: Losses, z: Tensor, base: Tensor, generator: torch.Generator, *, widest: int = 0
    ) -> Tensor:
        """[B, …] from the losses around z and at z (base, [B]).

        widest: numbers per example that `losses` makes of a value on the way, where they are more than the value's own.
        """
        flat = z.flatten(1)
        each = 3 * len(flat) * max(widest, flat.shape[1]) * flat.element_size()
        at_once = max(1, _MEMORY // max(1, each))
        by = self._by_directions if self.name == "rge" else self._by_coordinates
        return by(losses, z, base, generator, at_once).view_as(z)

    def _by_directions(
        self, losses: Losses, z: Tensor, base: Tensor, generator: torch.Generator, at_once: int
    ) -> Tensor:
        flat = z.flatten(1)
        gradient = torch.zeros_like(flat)
        for start in range(0, self.slopes, at_once):
            chunk = range(start, min(start + at_once, self.slopes))
            # One draw per direction: what is drawn does not depend on how many are evaluated together.
            each = [torch.randn(flat.shape, generator=generator, dtype=torch.float32) for _ in chunk]
            directions = torch.stack(each).to(flat)
            slopes = self._slopes(losses, z, base, directions)
            gradient += torch.einsum("pb,pbd->bd", slopes.to(flat), directions)
        return gradient / self.slopes

    def _by_coordinates(
        self, losses: Losses, z: Tensor, base: Tensor, generator: torch.Generator, at_once: int
    ) -> Tensor:
        """Rounds over all coordinates, each of one evaluation, or two for the central difference."""
        flat, each = z.flatten(1), self._each
        batch, size = flat.shape
        full, left = divmod(self.slopes, size)
        last = torch.rand(batch, size, generator=generator).argsort(1)[:, :left].to(z.device) if left else None
        rounds = [torch.arange(size, device=z.device).expand(batch, size)] * full + ([] if last is None else [last])
        counts = torch.full((batch, size), full * each, device=z.device)
        if last is not None:
            counts.scatter_add_(1, last, torch.full_like(last, each))
        stencil = Stencil(len(rounds) * each)
        weights = torch.stack([stencil.weights(count) for count in range(stencil.most + 1)]).to(z.device)
        gradient = torch.zeros(batch, size, dtype=torch.float64, device=z.device)
        for number in range(stencil.most):
            for columns in rounds[number // each].split(at_once, 1):
                directions = F.one_hot(columns.T, size).to(flat)
                change = (_at(losses, z, directions, stencil.step(number) * self.mu) - base) / self.mu
                gradient.scatter_add_(1, columns, change.T * weights[counts.gather(1, columns), number])
        return gradient.to(flat)

    def _slopes(self, losses: Losses, z: Tensor, base: Tensor, directions: Tensor) -> Tensor:
        """[P, B] along directions [P, B, d]."""
        above = _at(losses, z, directions, self.mu)
        if self.difference == "central":
            return (above - _at(losses, z, directions, -self.mu)) / (2 * self.mu)
        return (above - base) / self.mu


def _at(losses: Losses, z: Tensor, directions: Tensor, step: float) -> Tensor:
    """Losses at z + step·u for P directions of every example: [P, B]."""
    count, batch, _ = directions.shape
    moved = z.flatten(1) + step * directions
    owners = torch.arange(batch, device=z.device).repeat(count)
    return losses(moved.view(count * batch, *z.shape[1:]), owners).view(count, batch)
