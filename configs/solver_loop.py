"""The schema of a solver in the loop: a coarse solver, a network that corrects it, and ways to train that network.

Defaults are the paper's where the paper has one (DeepZero, section 5, on the set-ups of Um et al. 2020).
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from configs.schema import (
    Arguments,
    BudgetPruningConfig,
    ClusterConfig,
    Count,
    Flag,
    Name,
    Natural,
    OptimizerConfig,
    Positive,
    Real,
    ScheduleConfig,
    Section,
    Seed,
    Text,
)

SimulatorKind = Literal["burgers", "wake", "external", "function"]
LoopMethod = Literal["src", "non", "sol-fo", "sol-zo", "sol-zo-split"]

LOOP_METHODS: tuple[str, ...] = get_args(LoopMethod)
PHIFLOW = ("burgers", "wake")
"""Kinds of simulator that are here, reference runs included."""
ASKING = ("sol-zo", "sol-zo-split")
"""Methods that need nothing of the solver but its answers."""


class SimulatorConfig(Section):
    kind: SimulatorKind = "burgers"
    """burgers or wake, by PhiFlow; your own program (external) or Python function."""
    cells: tuple[Count, Count] = (32, 32)
    """Rows and columns of the source grid of burgers and wake."""
    factor: Count = 4
    """The reference has so many times more cells along each axis."""
    size: Positive = 32.0
    """Edge of the domain of burgers; that of the wake is 100 × 200."""
    dt: Positive = 0.1
    """Time step of burgers; that of the wake is 1."""
    viscosity: Annotated[Real, Field(ge=0)] = 0.1
    """ν of burgers, on every grid; the wake has Reynolds numbers."""
    settings: Arguments = Field(default_factory=dict)
    """Of your own simulator: command or function, state_shapes, param_shapes, timeout, …"""
    field: Text | None = None
    """Of your own simulator: the field of its state that is corrected and compared."""


class CasesConfig(Section):
    train: Annotated[tuple[Annotated[Real, Field(ge=0)], ...], Field(min_length=1)] = tuple(range(10))
    """Seeds of burgers and of your own cases, Reynolds numbers of the wake."""
    test: Annotated[tuple[Annotated[Real, Field(ge=0)], ...], Field(min_length=1)] = tuple(range(100, 105))
    """What the trained correctors are tried on, once."""
    validation: tuple[Annotated[Real, Field(ge=0)], ...] = ()
    """What settings and checkpoints are chosen on; none: every training ends with the corrector of its last step."""
    skip: Natural = 30
    """First frames of a reference run that are left out."""
    frames: Count = 200
    """Frames that are kept."""
    function: Text | None = None
    """Your own cases: package.module:callable, (number, skip, frames) → (frames, params), dicts of arrays [T, …]."""


class CorrectorConfig(Section):
    name: Text = "residual"
    """residual (260,354 parameters at three channels), plain (56,898), small, or your own package.module:callable."""
    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments of your own callable."""


class LoopPretrainingConfig(Section):
    steps: Natural = 0
    """Steps of `non` that every method begins with; 0: none."""
    batch_size: Count = 32
    """Pairs per step."""
    lr: Positive = 1e-3
    """Peak learning rate of Adam."""


class LoopPruningConfig(BudgetPruningConfig):
    examples: Count = 32
    """Training windows that the scores are computed on."""
    redraw_steps: Count = 10
    """A new mask is drawn every so many steps."""


class UnrollStage(Section):
    steps: Count
    """Training steps."""
    unroll: Count
    """Solver steps m of the loop meanwhile."""


class LoopTrainingConfig(Section):
    method: LoopMethod = "sol-zo"
    """How the corrector learns."""
    steps: Count = 1000
    """Training steps of every method."""
    batch_size: Count = 3
    """Simulations per step, pairs per step of `non`."""
    unroll: Count = 4
    """Solver steps m of the loop."""
    curriculum: tuple[UnrollStage, ...] = ()
    """Shorter loops to begin with; `unroll` is for what is left of the steps."""
    queries: Count = 1024
    """Evaluations of the loss that every zeroth-order method spends per step, the same for all."""
    optimizer: OptimizerConfig = OptimizerConfig(name="Adam", lr=1e-4)
    """What makes a step of a gradient."""
    schedule: ScheduleConfig = ScheduleConfig(warmup_epochs=0)
    """The learning rate over time."""
    lr: dict[LoopMethod, Positive] = Field(default_factory=dict)
    """Peak learning rates of single methods, where they are not the optimizer's."""
    mu: dict[LoopMethod, Positive] = Field(default_factory=dict)
    """Smoothing parameters μ: of sol-zo (1e-3) for parameters, of sol-zo-split (1e-2) for the solver's state."""
    penalty: Positive = 10.0
    """Mean squared error, in variances, that a simulation has from its divergence or crash on."""
    validations: Count = 10
    """How often in a training the corrector is tried on the validation cases, if there are any; the best is kept."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    threads: Count = 1
    """Threads of torch."""


class RollOutConfig(Section):
    frames: Count = 199
    """Steps from the first frame of every test case on."""
    animation: Flag = True
    """Draw one, of the first test case."""


class SolverLoop(Section):
    """Everything that decides the result of a solver in the loop."""

    name: Name = "solver-loop"
    """Name of the experiment in MLflow and in file names."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Every method is trained and rolled out once for each: weights, batches, masks, directions."""
    simulator: SimulatorConfig = SimulatorConfig()
    """The coarse solver."""
    cases: CasesConfig = CasesConfig()
    """What is simulated, for training and for testing."""
    corrector: CorrectorConfig = CorrectorConfig()
    """The network that corrects it."""
    pretraining: LoopPretrainingConfig = LoopPretrainingConfig()
    """What is learned outside the loop."""
    pruning: LoopPruningConfig = LoopPruningConfig()
    """How the queries of a step are shared out among the layers."""
    training: LoopTrainingConfig = LoopTrainingConfig()
    """Method, length, queries and optimiser."""
    baselines: tuple[LoopMethod, ...] = ()
    """Further methods for comparison; src: no corrector."""
    rollout: RollOutConfig = RollOutConfig()
    """How far the trained correctors are tried."""
    cluster: ClusterConfig = ClusterConfig(workers=0)
    """Workers that reference runs are shared out to, and the steps of your own program or function."""

    @property
    def methods(self) -> tuple[LoopMethod, ...]:
        """The method of the experiment and those to compare it with."""
        return tuple(dict.fromkeys([self.training.method, *self.baselines]))

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(steps, m) of the training, in order."""
        first = [(stage.steps, stage.unroll) for stage in self.training.curriculum]
        return (*first, (self.training.steps - sum(steps for steps, _ in first), self.training.unroll))

    @property
    def longest(self) -> int:
        """The largest m."""
        return max(unroll for _, unroll in self.stages)

    @model_validator(mode="after")
    def _combinations_are_possible(self) -> Self:
        # Imported late: the checks read these very classes.
        from configs.checks import raise_problems
        from configs.solver_loop_checks import CHECKS

        raise_problems(self, CHECKS)
        return self
