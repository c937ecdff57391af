"""One parameter, many uses: unrolled solver loops, recurrence, shared weights, a forward pass called several times."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import BlackBox, cge, first_order, reference, rge
from deepzero_core.perturb.evaluator import prepare

Build = Callable[[], nn.Module]


def diffusion(u: np.ndarray) -> np.ndarray:
    """One explicit step of a non-linear diffusion on a periodic grid, [N, C, X] → [N, C, X]."""
    flux = (1 + u**2) * (np.roll(u, -1, -1) - u)
    return u + 0.1 * (flux - np.roll(flux, 1, -1))


class SolverLoop(nn.Module):
    """u ← u + correction(solver(u)), three times: the corrector of a solver in the loop."""

    def __init__(self, solver: nn.Module) -> None:
        super().__init__()
        self.solver = solver
        self.correction = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 1, 3, padding=1))

    def forward(self, u: Tensor) -> Tensor:
        states = []
        for _ in range(3):
            u = self.solver(u)
            u = u + self.correction(u)
            states.append(u)
        return torch.stack(states, 1)


class BlackSolverInTheMiddle(SolverLoop):
    """The black box answers to a state that earlier answers have changed; BatchNorm has statistics of every call."""

    def __init__(self) -> None:
        super().__init__(BlackBox(diffusion, batch_size=7))
        self.correction.append(nn.BatchNorm1d(1))


class Rollout(nn.Module):
    """A recurrent cell over time, its output fed back as its input."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.read = cell, nn.Linear(3, 6)

    def forward(self, u: Tensor) -> Tensor:
        x, state = u[:, 0], u.new_zeros(len(u), 3)
        for _ in range(3):
            state = self.cell(x, state)
            x = self.read(state)
        return x


class TiedEncoder(nn.Module):
    """One weight as it is and transposed, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, u: Tensor) -> Tensor:
        x = u[:, 0]
        for _ in range(2):
            x = F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t(), self.bias)
        return x


class TwoViews(nn.Module):
    """The same network on two views of the batch and on its own answer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.GELU())

    def forward(self, u: Tensor) -> Tensor:
        x = u[:, 0]
        left, right = self.network(x), self.network(x.flip(1))
        return torch.cat([left * right, self.network(left)], 1)


MODULES: dict[str, Build] = {
    "black_solver": lambda: SolverLoop(BlackBox(diffusion)),
    "black_solver_in_the_middle": BlackSolverInTheMiddle,
    "torch_solver": lambda: SolverLoop(nn.Conv1d(1, 1, 3, padding=1)),
    "gru": lambda: Rollout(nn.GRUCell(6, 3)),
    "rnn": lambda: Rollout(nn.RNNCell(6, 3)),
    "tied": TiedEncoder,
    "two_views": TwoViews,
}


def rollout_error(states: Tensor, targets: Tensor) -> Tensor:
    """[B, …], [B] → [B]"""
    return (states.flatten(1) - targets[:, None]).square().mean(1)


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = MODULES[name]().double()
    return module, torch.randn(5, 1, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_engine_agrees_with_reference(name: str, training: bool) -> None:
    module, inputs, targets = problem(name)
    module.train(training)
    assert prepare(module, inputs, targets, rollout_error).untraced is None
    found = cge(module, inputs, targets, rollout_error, mu=1e-3)
    expected = reference.cge(module, inputs, targets, rollout_error, mu=1e-3)
    for parameter, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[parameter], gradient, rtol=1e-5, atol=1e-8)
        assert gradient.abs().sum() > 0
    for buffer, value in expected.buffers.items():
        torch.testing.assert_close(found.buffers[buffer], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_random_directions_agree_with_reference(name: str) -> None:
    module, inputs, targets = problem(name)
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    found = rge(module, inputs, targets, rollout_error, queries=6, generator=first)
    expected = reference.rge(module, inputs, targets, rollout_error, queries=6, generator=second)
    for parameter, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[parameter], gradient, rtol=1e-6, atol=1e-9)


def test_a_solver_step_is_one_question_for_all_perturbations() -> None:
    module, inputs, targets = problem("black_solver")
    solver = module.solver
    chosen = {"correction.0.weight": torch.arange(6)}
    evaluator = prepare(module, inputs, targets, rollout_error)
    cge(module, inputs, targets, rollout_error, coordinates=chosen, evaluator=evaluator)
    calls, queries = solver.calls, solver.queries
    cge(module, inputs, targets, rollout_error, coordinates=chosen, evaluator=evaluator)
    # Three steps for the base; the first of them comes before the corrector and never changes.
    assert solver.calls - calls == 3 + 2
    assert solver.queries - queries == 5 * (3 + 2 * 6)


def test_a_loss_may_call_the_module_again() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

    def consistency(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - module(targets)).square().mean() + module(outputs).sum()

    found = cge(module, inputs, targets, consistency, mu=1e-6)
    expected = reference.cge(module, inputs, targets, consistency, mu=1e-6)
    exact = first_order(module, inputs, targets, consistency)
    assert int(module[1].num_batches_tracked) == 0
    assert int(found.buffers["1.num_batches_tracked"]) == 3
    for name, gradient in exact.gradients.items():
        torch.testing.assert_close(found.gradients[name], expected.gradients[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-3, atol=1e-4)
