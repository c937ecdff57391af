"""The schema of a defence: a classifier that may only be queried, and a denoiser trained in front of it.

Defaults are the paper's where the paper has one (DeepZero, section 5; denoised smoothing after Salman et al. 2020).
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from configs.schema import (
    Arguments,
    BudgetPruningConfig,
    CertificationConfig,
    ClusterConfig,
    Count,
    DataConfig,
    Flag,
    ModelConfig,
    Name,
    OptimizerConfig,
    Positive,
    Real,
    ScheduleConfig,
    Section,
    Seed,
    Text,
)

DefenceMethod = Literal["none", "fo-ds", "zo-ds", "zo-ae-ds", "deepzero", "deepzero-split"]
VictimKind = Literal["trained", "module", "function", "onnx", "http", "mlflow"]

DEFENCE_METHODS: tuple[str, ...] = get_args(DefenceMethod)
WHITE_BOX = ("trained", "module")
"""Kinds of classifier that can be differentiated, where somebody wants to know what that would have given."""


class VictimConfig(Section):
    kind: VictimKind = "trained"
    """Where the classifier comes from: trained here, or your own network, function, ONNX file or scoring server."""
    model: ModelConfig = ModelConfig()
    """Network of a classifier that is trained here."""
    epochs: Count = 30
    """Epochs of its training, by first order."""
    lr: Positive = 0.1
    """Its peak learning rate."""
    settings: Arguments = Field(default_factory=dict)
    """Of your own classifier: path of an onnx file, url of a server, module or function as package.module:name."""
    answers: Literal["logits", "probabilities"] = "logits"
    """What your own classifier answers."""
    batch_size: Count | None = None
    """The most images of one question to your own classifier."""
    cache: Flag = False
    """Keep every answer of your own classifier, and never ask the same twice."""
    budget: Count | None = None
    """The most images that your own classifier may be asked about, training and certification together."""
    images_per_second: Positive | None = None
    """How fast your own classifier may be asked, by all workers together."""
    calls_per_second: Positive | None = None
    """The same of questions, of up to `batch_size` images each."""
    price_per_thousand: Positive | None = None
    """What 1,000 images cost, for the report."""


class DenoiserConfig(Section):
    name: Text = "dncnn"
    """dncnn, unet, autoencoder or your own package.module:callable."""
    depth: Count | None = None
    """Layers of the dncnn (17), levels of the unet (2)."""
    width: Count | None = None
    """Channels of the dncnn (64), of the unet's first level (16)."""
    latent: Count = 1152
    """Numbers per image between encoder and decoder, where zo-ae-ds has its finite differences."""
    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments of your own callable."""


class PretrainingConfig(Section):
    steps: Count = 1000
    """Steps of mean squared error on noisy images, for denoiser and autoencoder each; no query is spent."""
    lr: Positive = 1e-3
    """Peak learning rate of Adam."""


class DenoiserPruningConfig(BudgetPruningConfig):
    examples: Count = 250
    """Training images that the scores are computed on."""
    redraw_epochs: Count = 1
    """A new mask is drawn every so many epochs."""


class DefenceTrainingConfig(Section):
    method: DefenceMethod = "deepzero"
    """How the denoiser learns what the classifier needs; none: no denoiser."""
    queries: Count = 1152
    """Evaluations of the loss on the batch that every zeroth-order method spends per step, the same for all."""
    steps: Count = 500
    """Training steps."""
    optimizer: OptimizerConfig = OptimizerConfig(name="Adam", lr=1e-3)
    """What makes a step of a gradient."""
    schedule: ScheduleConfig = ScheduleConfig(warmup_epochs=0)
    """The learning rate over time."""
    lr: dict[DefenceMethod, Positive] = Field(default_factory=dict)
    """Peak learning rates of single methods, where they are not the optimizer's."""
    reconstruction: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of ‖D(x + δ) − x‖² beside the stability loss."""
    mu: Positive | None = None
    """Smoothing parameter μ of all zeroth-order methods; each has its own where this is left out."""
    latent_estimator: Literal["rge", "cge"] = "cge"
    """How zo-ae-ds estimates at the latent: random directions or coordinates."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    threads: Count = 1
    """Threads of torch."""


class Defence(Section):
    """Everything that decides the result of a defence."""

    name: Name = "defence"
    """Name of the experiment in MLflow and in file names."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Every method is trained and certified once for each: weights, batches, noise, masks, directions."""
    data: DataConfig = DataConfig()
    """Images that the denoiser learns from, and those that are certified."""
    victim: VictimConfig = VictimConfig()
    """The classifier that may only be queried."""
    denoiser: DenoiserConfig = DenoiserConfig()
    """The network in front of it."""
    pretraining: PretrainingConfig = PretrainingConfig()
    """What is learned without a query."""
    pruning: DenoiserPruningConfig = DenoiserPruningConfig()
    """How the queries of a step are shared out among the layers."""
    training: DefenceTrainingConfig = DefenceTrainingConfig()
    """Method, length, queries and optimiser."""
    baselines: tuple[DefenceMethod, ...] = ()
    """Further methods for comparison."""
    certification: CertificationConfig = CertificationConfig()
    """Its σ is that of the noise in training, too."""
    cluster: ClusterConfig = ClusterConfig()
    """Where forward passes are evaluated."""

    @property
    def methods(self) -> tuple[DefenceMethod, ...]:
        """The method of the experiment and those to compare it with."""
        return tuple(dict.fromkeys([self.training.method, *self.baselines]))

    @model_validator(mode="after")
    def _combinations_are_possible(self) -> Self:
        # Imported late: the checks read these very classes.
        from configs.checks import raise_problems
        from configs.defence_checks import CHECKS

        raise_problems(self, CHECKS)
        return self
