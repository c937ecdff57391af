"""The adjoint of a solver by finite differences: Jᵀg from questions alone, the chain rule for everything else.

A solver's step changes a state little, so that J = I + (J − I), and only the second part is estimated:

    Jᵀg ≈ g + Σ_k c_k d_k,   c_k = gᵀ([S(x + μd_k) − S(x)]/μ − d_k)

with orthonormal directions d_k: the projection of (J − I)ᵀg on their span, exact up to O(μ) with as many as the state
has numbers, and never farther from it than g itself. With more questions than numbers a direction is asked again, in
rounds over all of them: from the other side, and then at smaller steps (`deepzero_core.estimators.stencil`).
"""

from typing import Any

import torch
from torch import Tensor

from deepzero_core.estimators.stencil import Stencil
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

    directions: [k, S], orthonormal. mu: in units of the state's numbers, ‖·‖₂ of a step. evaluations: k by default;
    more are for rounds over the directions, of which the last may be over the first of them alone.
    """

    def __init__(self, solver: Solver, directions: Tensor, mu: float, evaluations: int | None = None) -> None:
        self.solver, self.directions, self.mu = solver, directions, mu
        full, left = divmod(len(directions) if evaluations is None else evaluations, len(directions))
        self._rounds = [len(directions)] * full + ([left] if left else [])
        self._counts = torch.full((len(directions),), full)
        self._counts[:left] += 1

    def __call__(self, question: Tensor) -> Tensor:
        answer: Tensor = _Step.apply(question, self)
        return answer

    def adjoint(self, question: Tensor, answer: Tensor, gradient: Tensor) -> Tensor:
        """Jᵀg [N, S] of g [N, S]."""
        size = self.directions.shape[1]
        directions, stencil = self.directions.to(question), Stencil(len(self._rounds))
        weights = torch.stack([stencil.weights(int(count)) for count in self._counts]).to(question)
        coefficients = question.new_zeros(len(directions), len(question))
        known = torch.ones_like(coefficients, dtype=torch.bool)
        each = max(1, _AT_ONCE // question.numel())
        for number, count in enumerate(self._rounds):
            for chosen in torch.arange(count, device=question.device).split(each):
                some = stencil.step(number) * directions[chosen]
                moved = question.repeat(len(some), 1)
                moved[:, :size] += self.mu * some.repeat_interleave(len(question), 0)
                after = self.solver(moved).unflatten(0, (len(some), -1))
                change = (after[..., :size] - answer[:, :size]) / self.mu - some[:, None]
                coefficients[chosen] += weights[chosen, number, None] * torch.einsum("kns,ns->kn", change, gradient)
                known[chosen] &= (after[..., -1] > 0.5) & (answer[:, -1] > 0.5)
        # A simulation that dies on the way tells nothing of the slope.
        return gradient + torch.einsum("kn,ks->ns", torch.where(known, coefficients, 0), directions)


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
