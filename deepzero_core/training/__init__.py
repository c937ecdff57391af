"""Training: gradient sources, the loop, schedules, checkpoints."""

from deepzero_core.training.checkpoint import DamagedCheckpointError
from deepzero_core.training.schedule import Schedule
from deepzero_core.training.sources import (
    Batch,
    CGESource,
    FirstOrderSource,
    ForwardGradientSource,
    GradientSource,
    RGESource,
)
from deepzero_core.training.trainer import NonFiniteError, StepRecord, Trainer, TrainingSettings, check_state

__all__ = [
    "Batch",
    "CGESource",
    "DamagedCheckpointError",
    "FirstOrderSource",
    "ForwardGradientSource",
    "GradientSource",
    "NonFiniteError",
    "RGESource",
    "Schedule",
    "StepRecord",
    "Trainer",
    "TrainingSettings",
    "check_state",
]
