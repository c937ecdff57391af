"""Typed experiments: their schema, the presets and how they are read, overridden and written.

The one place that knows what an experiment may say. Nothing heavy is imported here: the command line starts at once.
"""

from configs.loading import dump, load, loads, presets
from configs.schema import (
    CertificationConfig,
    ClusterConfig,
    DataConfig,
    EstimatorConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PruningConfig,
    ScheduleConfig,
    TrainingConfig,
)

__all__ = [
    "CertificationConfig",
    "ClusterConfig",
    "DataConfig",
    "EstimatorConfig",
    "Experiment",
    "ModelConfig",
    "OptimizerConfig",
    "PruningConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "dump",
    "load",
    "loads",
    "presets",
]
