"""What the stages of a flow hand to each other: small, JSON-able, frozen. Everything large is a file that they name."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from deepzero_core.data import ImageStore


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Prepared(Record):
    """A data store that is ready."""

    store: Path
    digest: str
    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    counts: dict[str, int]

    @classmethod
    def of_store(cls, store: Path) -> Self:
        """The record of a store that is there."""
        manifest = ImageStore.open(store).manifest
        return cls(
            store=store,
            digest=manifest.digest,
            name=manifest.name,
            class_names=manifest.class_names,
            image_shape=manifest.image_shape,
            counts=dict(manifest.counts),
        )


class Pruned(Record):
    """Scores and the layer-wise pruning ratios that they lead to."""

    folder: Path
    method: str
    sparsity: float
    ratios: dict[str, float]
    """By maskable parameter: the share of it that is not estimated."""
    sizes: dict[str, int]
    """By trainable parameter: its number of coordinates."""
    coordinates: int
    """Coordinates estimated per step."""
    queries: int
    """Loss evaluations that the scores cost."""
    seconds: float


class Trained(Record):
    """A training run that ended."""

    method: str
    folder: Path
    history: Path
    """JSON lines: one object per step or evaluation, see `tasks.train`."""
    weights: Path
    weights_digest: str
    """sha256 of the weights' values: equal for equal networks, whoever trained them."""
    sparse: bool
    """Whether pruning decided what was trained."""
    steps: int
    queries: int
    seconds: float


class Evaluated(Record):
    """A network's answers on the test split."""

    accuracy: float
    loss: float
    confusion: tuple[tuple[int, ...], ...]
    """Rows: true class, columns: predicted class."""


class Certified(Record):
    """Randomised smoothing of the trained network."""

    table: Path
    """Parquet: example, label, predicted (-1: abstained), radius, p_lower, samples, saved."""
    examples: int
    accuracy_at: dict[float, float]
    """Certified accuracy by radius."""
    average_radius: float
    abstained: int
    sigma: float
    alpha: float
    samples: int
    """Noisy copies that the answers rest on, all examples together."""
    saved: int = 0
    """Copies that adaptive mode did without."""
    seconds: float

    @property
    def share_saved(self) -> float:
        """Of the copies that n0 + n would have been for every example."""
        return self.saved / (self.samples + self.saved)


class MethodResult(Record):
    """One line of the closing table."""

    method: str
    sparsity: float | None
    trained: Trained
    evaluated: Evaluated


class Reported(Record):
    """Where the report lies."""

    folder: Path
    html: Path
    markdown: Path
    result: Path


class Studied(Record):
    """What one run of a study came to: `metrics` as MLflow has them, in the run `run_id`."""

    report: Path
    metrics: dict[str, float]
    run_id: str
    seconds: float


class Outcome(Record):
    """A point of a study and a seed: what came of it, or the sentence that it failed with."""

    values: dict[str, Any]
    seed: int
    studied: Studied | None = None
    error: str = ""


class Victim(Record):
    """A classifier that is to be defended, and what it has said so far."""

    folder: Path
    kind: str
    name: str
    description: dict[str, Any]
    """What `infra.victims` opens."""
    labels: Path
    """numpy int64: its answer to every training image, as it is."""
    fingerprint: str
    """Of its answers: another classifier has another."""
    accuracy: float
    """On the test images, without noise and without defence."""
    asked: int
    """Images that this stage has asked it about."""
    seconds: float


class Pretrained(Record):
    """A denoiser or an autoencoder that has learned to give back images."""

    network: str
    folder: Path
    history: Path
    weights: Path
    weights_digest: str
    parameters: int
    loss: float
    """Mean squared error per pixel of the last steps."""
    seconds: float


class Shares(Record):
    """How the queries of a step of sparse estimation are shared out over the denoiser."""

    ratios: dict[str, float]
    """By parameter: the share of it that is not estimated."""
    coordinates: int
    queries: int
    """Loss evaluations that the scores cost."""
    seconds: float


class Defended(Record):
    """What a method has put in front of the classifier."""

    method: str
    seed: int
    folder: Path
    history: Path | None
    weights: Path | None
    """Of the network that images go through before the classifier sees them; None: they go through none."""
    weights_digest: str
    purifier: dict[str, Any] | None
    """What `infra.classifiers` builds that network from."""
    steps: int
    queries: int
    """Evaluations of the loss on a batch."""
    asked: int
    """Images that the classifier was asked about, in training."""
    seconds: float


class DefenceResult(Record):
    """One method with one seed."""

    defended: Defended
    certified: Certified

    @property
    def method(self) -> str:
        return self.defended.method


class Cases(Record):
    """Reference runs on the source grid, for training and for test."""

    store: Path
    digest: str
    name: str
    counts: dict[str, int]
    frames: int
    numbers: int
    """Of one frame's state."""
    seconds: float


PRETRAINED = "pre-trained"
"""The method of a corrector that is what all others begin with."""


class Corrected(Record):
    """A corrector that a method has trained."""

    method: str
    seed: int
    folder: Path
    history: Path | None
    weights: Path | None
    """None: no corrector."""
    weights_digest: str
    parameters: int
    steps: int
    kept_step: int
    """The training step after which it was best on the validation cases; without these the last one."""
    validation_mae: float | None
    """Its error there."""
    queries: int
    """Evaluations of the loss on a batch."""
    solver_steps: int
    """Of one simulation each, asked of the solver in training."""
    diverged: int
    crashed: int
    restarts: int
    seconds: float


class RolledOut(Record):
    """Test cases simulated with a corrector, beside their reference."""

    table: Path
    """Parquet: case, frame, mae, relative_error, spectrum_error; from a divergence on they are null."""
    images: Path
    """Arrow: the image of every frame of the first case."""
    cases: tuple[str, ...]
    mae: tuple[float, ...]
    """By case: the mean absolute error over all frames before a divergence."""
    relative_error: tuple[float, ...]
    spectrum_error: tuple[float, ...] | None
    diverged: int
    """Cases that do not reach the last frame."""
    steps_per_second: float
    seconds: float


class LoopResult(Record):
    """One method with one seed."""

    corrected: Corrected
    rolled: RolledOut

    @property
    def method(self) -> str:
        return self.corrected.method
