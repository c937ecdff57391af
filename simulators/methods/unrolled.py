"""The loop: a solver's step and a correction, m times, with the same parameters, as one module.

    x ← S(x; p_k),   x ← x + s · C(x, p_k),   k = 1 … m

    inputs      [B, S + m·P]     the first state and the parameters of every step, packed
    question    [N, S + P + 1]   what the solver is asked: state, parameters, and 1 for a simulation that lives
    answer      [N, S + 1]       the state one step later, and 1 where it lives
    outputs     [B, m, V + 1]    the image after every step, flat, and 1 where it lives
    targets     [B, m, V]        the image of the reference

A dead simulation is carried along as zeros: nothing that is not finite meets a network, and a black box that is asked
about zeros to learn the shape of its answers does not bother the simulator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from simulators.methods.coupling import Coupling
from simulators.methods.packing import Packing, required
from simulators.protocol import Simulator, alive

Solver = Callable[[Tensor], Tensor]
"""Question [N, S + P + 1] → answer [N, S + 1]."""


@dataclass(frozen=True)
class Packed:
    """A simulator as a function from questions to answers, differentiable where the simulator is."""

    simulator: Simulator

    @property
    def state(self) -> Packing:
        return required(self.simulator.state_shapes, self.simulator.optional)

    @property
    def params(self) -> Packing:
        return Packing(self.simulator.param_shapes)

    def __call__(self, question: Tensor) -> Tensor:
        flat, params, lives = question.split([self.state.size, self.params.size, 1], 1)
        flat = torch.where(lives > 0.5, flat, torch.nan)
        after = self.simulator.step(self.state.unpack(flat), self.params.unpack(params))
        lives = alive(after)[:, None]
        return torch.cat([torch.where(lives, self.state.pack(after), 0), lives.to(question)], 1)

    def of_arrays(self, question: np.ndarray) -> np.ndarray:
        """The same for a black box."""
        with torch.no_grad():
            return self(torch.from_numpy(question)).numpy()


class Unrolled(nn.Module):
    """m steps of the loop: [B, S + m·P] → [B, m, V + 1].

    solver: asked m times, all simulations at once; whatever of a differentiable function, a black box and finite
    differences it is. corrector: features [N, C + E, …] → [N, C, …].
    """

    def __init__(self, corrector: nn.Module, solver: Solver, packed: Packed, coupling: Coupling, steps: int) -> None:
        super().__init__()
        self.corrector = corrector
        self.solver, self.coupling, self.steps = solver, coupling, steps
        self.state, self.params = packed.state, packed.params

    def forward(self, inputs: Tensor) -> Tensor:
        flat, *params = inputs.split([self.state.size, *[self.params.size] * self.steps], 1)
        lives = torch.ones_like(flat[:, :1])
        images = []
        for given in params:
            answer = self.solver(torch.cat([flat, given, lives], 1))
            flat, lives = answer[:, :-1], answer[:, -1:]
            state, fields = self.state.unpack(flat), self.params.unpack(given)
            state = self.coupling.corrected(state, self.corrector(self.coupling.features(state, fields)))
            flat = self.state.pack(state)
            images.append(torch.cat([self.coupling.image(state).flatten(1), lives], 1))
        return torch.stack(images, 1)


@dataclass(frozen=True)
class RolloutLoss:
    """½ Σ ((v − r)/s)² of every step, averaged over the steps: outputs [B, m, V + 1], targets [B, m, V] → [B].

    scales: s, one for each channel of the image. penalty: the mean of ((v − r)/s)² that a dead simulation is taken to
    have, at every step from its death on. Source of the loss: Um et al. 2020.
    """

    scales: tuple[float, ...]
    penalty: float = 10.0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        images, lives = outputs[..., :-1], outputs[..., -1]
        scaled = (images - targets).unflatten(-1, (len(self.scales), -1)) / targets.new_tensor(self.scales)[:, None]
        error = scaled.square().flatten(-2).sum(-1) / 2
        return torch.where(lives > 0.5, error, self.penalty * targets.shape[-1] / 2).mean(-1)
