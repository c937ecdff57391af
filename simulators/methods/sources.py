"""Where the gradient of a corrector comes from: one class for each method, on the interface of every gradient source.

    non            pre-generated pairs S(x_t) → x_{t+1}, no interaction, first order
    sol-fo         backpropagation through m steps of the solver: the upper bound
    sol-zo         sparse CGE of the corrector's parameters, the solver a black box between its calls
    sol-zo-split   finite differences across the solver alone, the chain rule for the corrector

The module is the corrector; batches are those of `Windows`. A query is one evaluation of the loss on the batch, m
solver steps of B simulations. The first solver step does not depend on the corrector and is never repeated.
"""

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.estimators import first_order
from deepzero_core.estimators.cge import DEFAULT_MEMORY
from deepzero_core.perturb.black_box import BlackBox
from deepzero_core.perturb.estimate import GradientEstimate, check_arguments, check_queries
from deepzero_core.training.sources import Batch, CGESource, Coordinates, step_generator
from simulators.methods.adjoint import Differenced, random_directions
from simulators.methods.coupling import Coupling
from simulators.methods.unrolled import Packed, RolloutLoss, Solver, Unrolled
from simulators.protocol import Simulator

_PREFIX = "corrector."


@dataclass(frozen=True)
class Loop:
    """What is trained in: simulator, its coupling to the corrector, m, and the loss.

    RequestError: fewer than one step.
    """

    simulator: Simulator
    coupling: Coupling
    steps: int = 4
    penalty: float = 10.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RequestError(f"the steps of an unrolled loop must be at least 1, not {self.steps}")

    @property
    def packed(self) -> Packed:
        return Packed(self.simulator)

    @property
    def loss(self) -> RolloutLoss:
        return RolloutLoss(self.coupling.scales.image, self.penalty)

    def unrolled(self, corrector: nn.Module, solver: Solver) -> Unrolled:
        return Unrolled(corrector, solver, self.packed, self.coupling, self.steps)

    def solver_steps(self, queries: int, batch: int) -> int:
        """Simulation-steps of a training step that spends so many queries."""
        return batch * (self.steps + (queries - 1) * (self.steps - 1))


@dataclass(frozen=True)
class NonInteractive:
    """NON: the corrector learns to turn S(x_t), computed once beforehand, into x_{t+1}; m = 1, no solver is asked.

    Batches are of `Windows.pairs`: inputs [B, S + P], the state being S(x_t), targets [B, 1, V].
    """

    loop: Loop

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return 1

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        one = replace(self.loop, steps=1)
        size = one.packed.state.size

        def known(question: Tensor) -> Tensor:
            return question[:, [*range(size), -1]]

        return _of_corrector(first_order(one.unrolled(module, known), batch.inputs, batch.targets, one.loss))


@dataclass(frozen=True)
class FirstOrderLoop:
    """SOL-FO: one query, and its derivative.

    RequestError: a simulator that torch cannot differentiate.
    """

    loop: Loop

    def __post_init__(self) -> None:
        if not self.loop.simulator.differentiable:
            name = type(self.loop.simulator).__name__
            raise RequestError(f"the simulator {name} is not differentiable: sol-fo needs one that is; use sol-zo")

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return 1

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        unrolled = self.loop.unrolled(module, self.loop.packed)
        return _of_corrector(first_order(unrolled, batch.inputs, batch.targets, self.loop.loss))


@dataclass
class ZerothOrderLoop:
    """SOL-ZO: coordinate-wise estimation of the loss of m steps, all perturbations of a chunk advanced together.

    mu: of the parameters. The simulator answers in float32 or float64, and its values cancel: see docs/black-boxes.md.
    """

    loop: Loop
    mu: float = 1e-3
    difference: str = "forward"
    memory: int = DEFAULT_MEMORY
    _cge: CGESource = field(init=False, repr=False)
    _box: BlackBox = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_arguments(self.mu, self.difference)
        self._cge = CGESource(self.loop.loss, self.mu, self.difference, self.memory)
        self._box = BlackBox(self.loop.packed.of_arrays)

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return self._cge.cost(module, coordinates)

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        unrolled = self.loop.unrolled(module, self._box)
        chosen = None if coordinates is None else {_PREFIX + name: value for name, value in coordinates.items()}
        return _of_corrector(self._cge.estimate(unrolled, batch, chosen))


@dataclass(frozen=True)
class SplitLoop:
    """SOL-ZO-SPLIT: the adjoint of every solver step but the first from `queries` − 1 directions.

    A step costs the solver what one of `ZerothOrderLoop` with as many queries does. mu: length of a step, in units of
    the state's numbers. Directions of a training step are a function of (seed, step); when the state has fewer numbers,
    they are asked again (see `Differenced`).
    """

    loop: Loop
    queries: int
    seed: int
    mu: float = 1e-2

    def __post_init__(self) -> None:
        check_arguments(self.mu, "forward")
        check_queries(self.queries - 1)

    def cost(self, module: nn.Module, coordinates: Coordinates | None) -> int:
        return self.queries

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Coordinates | None) -> GradientEstimate:
        generator = step_generator(self.seed, batch.number)
        directions = random_directions(self.queries - 1, self.loop.packed.state.size, generator)
        box = BlackBox(self.loop.packed.of_arrays)
        unrolled = self.loop.unrolled(module, Differenced(box, directions, self.mu, self.queries - 1))
        estimate = first_order(unrolled, batch.inputs, batch.targets, self.loop.loss)
        return replace(_of_corrector(estimate), queries=self.queries)


def _of_corrector(estimate: GradientEstimate) -> GradientEstimate:
    """The estimate by the corrector's own names.

    WorkError: every simulation is dead at the end: there is nothing to learn from.
    """
    lives = estimate.outputs[:, -1, -1] > 0.5
    if not bool(lives.any()):
        raise WorkError(f"all {len(lives)} simulations of a batch diverged or crashed before the corrector was changed")
    return replace(
        estimate,
        gradients={name.removeprefix(_PREFIX): value for name, value in estimate.gradients.items()},
        buffers={name.removeprefix(_PREFIX): value for name, value in estimate.buffers.items()},
    )
