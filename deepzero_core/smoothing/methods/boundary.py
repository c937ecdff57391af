"""Zeroth-order gradients at the boundary of a black box, for each example of a batch by itself.

    RGE   gᵢ = (1/q) Σₖ [l(zᵢ + μuᵢₖ) − l(zᵢ)]/μ · uᵢₖ,   uᵢₖ ~ N(0, I), each example its own
    CGE   gᵢ = Σⱼ [l(zᵢ + μeⱼ) − l(zᵢ)]/μ · eⱼ            over n coordinates: all of them, or n drawn for each example

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

from deepzero_core.errors import RequestError, suggest
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

    queries: the most that a step may spend, the base one included. "rge" spends all of them (all but one, where the
    central difference does not come out even); "cge" no more than it has coordinates for.

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

    def slopes(self, size: int) -> int:
        """Directions or coordinates of a step, where an example has `size` numbers at the boundary."""
        affordable = (self.queries - 1) // self._each
        return affordable if self.name == "rge" else min(affordable, size)

    def cost(self, size: int) -> int:
        """Queries of a step, the base one included."""
        return 1 + self.slopes(size) * self._each

    def gradient(
        self, losses: Losses, z: Tensor, base: Tensor, generator: torch.Generator, *, widest: int = 0
    ) -> Tensor:
        """[B, …] from the losses around z and at z (base, [B]).

        widest: numbers per example that `losses` makes of a value on the way, where they are more than the value's own.
        """
        flat = z.flatten(1)
        count = self.slopes(flat.shape[1])
        draw = self._random if self.name == "rge" else self._coordinates(flat, count, generator)
        gradient = torch.zeros_like(flat)
        each = 3 * len(flat) * max(widest, flat.shape[1]) * flat.element_size()
        at_once = max(1, _MEMORY // max(1, each))
        for start in range(0, count, at_once):
            directions = draw(flat, range(start, min(start + at_once, count)), generator)
            slopes = self._slopes(losses, z, base, directions)
            gradient += torch.einsum("pb,pbd->bd", slopes.to(flat), directions)
        return (gradient / count if self.name == "rge" else gradient).view_as(z)

    def _slopes(self, losses: Losses, z: Tensor, base: Tensor, directions: Tensor) -> Tensor:
        """[P, B] along directions [P, B, d]."""
        above = _at(losses, z, directions, self.mu)
        if self.difference == "central":
            return (above - _at(losses, z, directions, -self.mu)) / (2 * self.mu)
        return (above - base) / self.mu

    @staticmethod
    def _random(flat: Tensor, chunk: range, generator: torch.Generator) -> Tensor:
        # One draw per direction: what is drawn does not depend on how many are evaluated together.
        each = [torch.randn(flat.shape, generator=generator, dtype=torch.float32) for _ in chunk]
        return torch.stack(each).to(flat)

    @staticmethod
    def _coordinates(
        flat: Tensor, count: int, generator: torch.Generator
    ) -> Callable[[Tensor, range, torch.Generator], Tensor]:
        batch, size = flat.shape
        if count == size:
            chosen = torch.arange(size).expand(batch, size)
        else:
            chosen = torch.rand(batch, size, generator=generator).argsort(1)[:, :count]

        def one_hot(flat: Tensor, chunk: range, _: torch.Generator) -> Tensor:
            columns = chosen[:, chunk.start : chunk.stop].T.to(flat.device)
            return torch.zeros(*columns.shape, size, dtype=flat.dtype, device=flat.device).scatter_(
                2, columns[..., None], 1.0
            )

        return one_hot


def _at(losses: Losses, z: Tensor, directions: Tensor, step: float) -> Tensor:
    """Losses at z + step·u for P directions of every example: [P, B]."""
    count, batch, _ = directions.shape
    moved = z.flatten(1) + step * directions
    owners = torch.arange(batch, device=z.device).repeat(count)
    return losses(moved.view(count * batch, *z.shape[1:]), owners).view(count, batch)
