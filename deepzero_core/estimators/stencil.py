"""A slope from any number of evaluations along a direction, of which none lies farther away than μ.

    steps    t = +1, −1, +s₁, −s₁, +s₂, …   1 > s₁ > s₂ > … > 0, evenly spaced, in units of μ
    slope    Σ_k w_k [l(z + μt_k) − l(z)]/μ

w: the slope at the base of the parabola through it that fits best (least squares). One evaluation is the forward
difference; two are the central one; with two or more the error is O(μ²). Further ones average the rounding of the
answers and the kinks of what is asked, and bring no new error: all lie within μ. The same place is never asked twice,
as a black box says the same again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stencil:
    """most: evaluations along the direction that has the most."""

    most: int

    def step(self, number: int) -> float:
        """t of evaluation `number`, from 0 on."""
        levels = (self.most + 1) // 2
        size = (levels - number // 2) / levels
        return -size if number % 2 else size

    def weights(self, count: int) -> Tensor:
        """w [most] in float64 where a direction has `count` evaluations, the first ones; zero for the others."""
        found = torch.zeros(self.most, dtype=torch.float64)
        if count == 1:
            found[0] = 1 / self.step(0)
        elif count:
            steps = torch.tensor([self.step(number) for number in range(count)], dtype=torch.float64)
            found[:count] = torch.linalg.pinv(torch.stack([steps, steps.square()], 1))[0]
        return found
