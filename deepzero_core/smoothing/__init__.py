"""Randomised smoothing: certified predictions of any classifier."""

from deepzero_core.smoothing.certify import ABSTAIN, Certificate, certify, predict
from deepzero_core.smoothing.summary import average_certified_radius, certified_accuracy

__all__ = ["ABSTAIN", "Certificate", "average_certified_radius", "certified_accuracy", "certify", "predict"]
