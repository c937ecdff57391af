"""Randomised smoothing: certified predictions of any classifier, and denoisers that make them good ones."""

from deepzero_core.smoothing.certify import certify, certify_many, predict
from deepzero_core.smoothing.classifiers import label_table, relabelled
from deepzero_core.smoothing.courses import ABSTAIN, Certificate
from deepzero_core.smoothing.inference import Inference
from deepzero_core.smoothing.noise import noisy
from deepzero_core.smoothing.settings import Certification
from deepzero_core.smoothing.summary import (
    AccuracyCurve,
    accuracy_curve,
    average_certified_radius,
    certified_accuracy,
)

__all__ = [
    "ABSTAIN",
    "AccuracyCurve",
    "Certificate",
    "Certification",
    "Inference",
    "accuracy_curve",
    "average_certified_radius",
    "certified_accuracy",
    "certify",
    "certify_many",
    "label_table",
    "noisy",
    "predict",
    "relabelled",
]
