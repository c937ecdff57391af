"""The adjoint of a solver by finite differences: Jᵀg from questions alone, the chain rule for everything else.

A solver's step changes a state little, so that J = I + (J − I), and only the second part is estimated:

    Jᵀg ≈ g + Σ_k c_k d_k,   c_k = gᵀ([S(x + μd_k) − S(x)]/μ − d_k)

with orthonormal directions d_k: the projection of (J − I)ᵀg on their span, exact up to O(μ) with as many as the state
has numbers, and never farther from it than g itself.
"""

from typing import Any

import torch
from torch import Tensor

from simulators.methods.unrolled import Solver

_AT_ONCE = 1 << 22
"""Numbers of the largest question."""


def random_directions(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows [min(count, size), size] in float64, of no preferred direction."""
    drawn = torch.randn(size, min(count, size), generator=generator, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn).Q.T
    return orthonormal


class Differenced:
    """A solver [N, S + P + 1] → [N, S + 1] whose derivative by the state is estimated; those by the rest are zero.

    directions: [k, S], orthonormal. mu: in units of the state's numbers, ‖·‖₂ of a step.
    """

    def __init__(self, solver: Solver, directions: Tensor, mu: float) -> None:
        self.solver, self.directions, self.mu = solver, directions, mu

    def __call__(self, question: Tensor) -> Tensor:
        answer: Tensor = _Step.apply(question, self)
        return answer

    def adjoint(self, question: Tensor, answer: Tensor, gradient: Tensor) -> Tensor:
        """Jᵀg [N, S] of g [N, S]."""
        size = self.directions.shape[1]
        directions = self.directions.to(question)
        estimate = gradient.clone()
        each = max(1, _AT_ONCE // question.numel())
        for some in directions.split(each):
            moved = question.repeat(len(some), 1)
            moved[:, :size] += self.mu * some.repeat_interleave(len(question), 0)
            after = self.solver(moved).unflatten(0, (len(some), -1))
            change = (after[..., :size] - answer[:, :size]) / self.mu - some[:, None]
            # A simulation that dies on the way tells nothing of the slope.
            known = (after[..., -1] > 0.5) & (answer[:, -1] > 0.5)
            coefficients = torch.where(known, torch.einsum("kns,ns->kn", change, gradient), 0)
            estimate += torch.einsum("kn,ks->ns", coefficients, some)
        return estimate


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, question: Tensor, solver: Differenced) -> Tensor:
        answer = solver.solver(question)
        ctx.solver = solver
        ctx.save_for_backward(question, answer)
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        question, answer = ctx.saved_tensors
        size = ctx.solver.directions.shape[1]
        full = torch.zeros_like(question)
        full[:, :size] = ctx.solver.adjoint(question, answer, gradient[:, :size])
        return full, None
