"""Randomised smoothing: certified predictions of any classifier, and denoisers that make them good ones."""

from deepzero_core.smoothing.certify import ABSTAIN, Certificate, certify, predict
from deepzero_core.smoothing.classifiers import hide, label_table, relabelled
from deepzero_core.smoothing.noise import noisy
from deepzero_core.smoothing.summary import average_certified_radius, certified_accuracy

__all__ = [
    "ABSTAIN",
    "Certificate",
    "average_certified_radius",
    "certified_accuracy",
    "certify",
    "hide",
    "label_table",
    "noisy",
    "predict",
    "relabelled",
]
