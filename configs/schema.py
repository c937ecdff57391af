"""The schema of one experiment. Defaults are the paper's where the paper has one (Chen et al., DeepZero, ICLR 2024).

Every model is frozen and refuses unknown keys. Single values are checked here, combinations in `configs.checks`.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

TrainingMethod = Literal[
    "cge",
    "rge",
    "forward-gradient",
    "first-order",
    "first-order-sparse-weights",
    "first-order-sparse-gradients",
]
PruningMethod = Literal["none", "random", "magnitude", "grasp", "zo-grasp"]
Difference = Literal["forward", "central"]
Precision = Literal["float32", "bfloat16", "value"]
ScheduleName = Literal["cosine", "constant"]

METHODS: tuple[str, ...] = get_args(TrainingMethod)
SPARSE_METHODS = ("first-order-sparse-weights", "first-order-sparse-gradients")


def _integral(value: Any) -> Any:
    # 1e6 is a float to YAML and a whole number to whoever writes it; True is neither.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# The bounds stand on the number itself: behind a validator pydantic checks them as well, but leaves them out of the
# JSON schema, by which Prefect's form refuses a wrong value before anything runs.
Count = Annotated[int, Field(strict=True, ge=1, le=2**63 - 1), BeforeValidator(_integral)]
Natural = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1), BeforeValidator(_integral)]
Seed = Natural
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Name = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


def _finite(value: Any) -> Any:
    numbers = [value]
    while numbers:
        item = numbers.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise PydanticCustomError("impossible", "a number in it is not finite")
        if isinstance(item, dict | list):
            numbers.extend(item.values() if isinstance(item, dict) else item)
    return value


Arguments = Annotated[dict[str, JsonValue], AfterValidator(_finite)]


class Section(BaseModel):
    """Base of every part of an experiment."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


class DataConfig(Section):
    name: Text = "digits"
    """Name of the data set; `deepzero data list` shows them."""
    source: Path | None = None
    """Folder (or .npz file) with the user's own or downloaded files."""
    batch_size: Count = 128
    """Examples per step."""
    train_limit: Count | None = None
    """Train on this many examples only."""
    test_limit: Count | None = None
    """Test on this many examples only."""
    crop_padding: Natural = 0
    """Pixels of padding for random crops; 0 switches them off."""
    flip: Flag = False
    """Random horizontal flips."""
    image_size: Count | None = None
    """Side in pixels to which an image folder is resized, where its images differ in size."""


class ModelConfig(Section):
    name: Text = "cnn"
    """cnn, resnet20, resnet32, resnet44, resnet56 or your own package.module:callable."""
    depth: Count = 2
    """Blocks of the cnn."""
    width: Count = 18
    """Channels of the cnn."""
    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments of your own callable."""


class PruningConfig(Section):
    method: PruningMethod = "zo-grasp"
    """Criterion that sets the layer-wise pruning ratios."""
    sparsity: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    """Share of the maskable coordinates that is not estimated."""
    queries: Count = 192
    """Random directions per estimate of ZO-GraSP."""
    samples_per_class: Count = 25
    """Examples per class that the scores are computed on."""
    mu: Positive = 5e-3
    """Smoothing parameter μ of ZO-GraSP."""
    redraw_epochs: Count = 1
    """A new mask is drawn every so many epochs."""


class BudgetPruningConfig(Section):
    method: Literal["zo-grasp", "uniform"] = "zo-grasp"
    """What decides how the queries of a step are shared out among the layers; uniform: by size."""
    queries: Count = 192
    """Random directions per estimate of ZO-GraSP."""
    mu: Positive = 5e-3
    """Smoothing parameter μ of ZO-GraSP."""


class EstimatorConfig(Section):
    mu: Positive = 5e-3
    """Smoothing parameter μ, the finite-difference step."""
    difference: Difference = "forward"
    """Forward or central difference."""
    queries: Count = 192
    """Directions per step of rge and forward-gradient."""
    precision: Precision = "float32"
    """float32 or bfloat16: changes beside cached values; value: perturbed values, as the paper computes them."""
    memory_mib: Count = 32
    """Memory that one evaluation may fill with perturbed activations, MiB."""


class OptimizerConfig(Section):
    name: Text = "SGD"
    """Any optimizer of torch.optim that steps from a gradient."""
    lr: Positive = 0.1
    """Peak learning rate."""
    arguments: Arguments = Field(default_factory=dict)
    """Its other keyword arguments; SGD: momentum 0.9 and weight_decay 5e-4 unless said otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _paper_settings_of_sgd(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("name", "SGD") != "SGD":
            return data
        given = data.get("arguments", {})
        return (
            {**data, "arguments": {"momentum": 0.9, "weight_decay": 5e-4, **given}} if isinstance(given, dict) else data
        )


class ScheduleConfig(Section):
    name: ScheduleName = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_epochs: Natural = 3
    """Epochs in which the learning rate rises linearly."""


class TrainingConfig(Section):
    method: TrainingMethod = "cge"
    """How the gradient is come by."""
    epochs: Count = 50
    """Passes over the training data."""
    steps: Count | None = None
    """Stop after this many steps, before the last epoch is over."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """What makes a step of a gradient."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over time."""
    query_budget: Count | None = None
    """Loss evaluations that the whole training may spend."""
    checkpoint_every: Count = 50
    """Steps between checkpoints."""
    evaluate_every: Count = 1
    """Epochs between evaluations on the test data."""
    threads: Count = 1
    """Threads of torch in every process."""


class CertificationConfig(Section):
    sigma: Positive = 0.25
    """Standard deviation σ of the noise, in units of images in [0, 1]."""
    n0: Count = 100
    """Samples that choose the class."""
    n: Count = 10_000
    """Samples that bound its probability; in adaptive mode at most so many."""
    alpha: Annotated[Real, Field(gt=0, lt=1)] = 0.001
    """Probability with which a certificate may be wrong."""
    adaptive: Flag = False
    """Stop an example as soon as it is settled whether it is certified at each of `radii`; the same guarantee."""
    examples: Count = 100
    """Test examples to certify."""
    batch_size: Count = 1000
    """Noisy copies per forward pass."""
    radii: tuple[Annotated[Real, Field(ge=0)], ...] = (0.0, 0.25, 0.5, 0.75)
    """Radii of the certified accuracies in the report."""


class ClusterConfig(Section):
    workers: Natural = 2
    """Local worker processes; 0 evaluates in this process. With an address or a spec: workers to wait for."""
    address: Text | None = None
    """Address of a running Dask scheduler, such as tcp://host:8786 or tls://host:8786."""
    spec: Text | None = None
    """How workers are come by: local, scheduler, scheduler-tls, slurm, kubernetes, cuda, or a YAML file of your own."""
    options: Arguments = Field(default_factory=dict)
    """Keys of that file to be set otherwise, such as {queue: long}."""
    timeout_s: Positive = 60.0
    """Seconds to wait for scheduler and workers."""


class Experiment(Section):
    """Everything that decides the result of a run."""

    name: Name = "experiment"
    """Name of the experiment in MLflow and in file names."""
    seed: Seed = 0
    """Decides initial weights, batches, masks and directions."""
    data: DataConfig = DataConfig()
    """What is learned from, and tested on."""
    model: ModelConfig = ModelConfig()
    """The network."""
    pruning: PruningConfig = PruningConfig()
    """Which share of every layer's coordinates is estimated."""
    estimator: EstimatorConfig = EstimatorConfig()
    """How a gradient is estimated from evaluations of the loss."""
    training: TrainingConfig = TrainingConfig()
    """Method, length and optimiser."""
    baselines: tuple[TrainingMethod, ...] = ()
    """Further methods to train for comparison."""
    certification: CertificationConfig = CertificationConfig()
    """Randomised smoothing; of the pipeline, `classify` does not certify."""
    cluster: ClusterConfig = ClusterConfig()
    """Where forward passes are evaluated."""

    @model_validator(mode="after")
    def _combinations_are_possible(self) -> Self:
        # Imported late: the checks read these very classes.
        from configs.checks import raise_problems

        raise_problems(self)
        return self
