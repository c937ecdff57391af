"""Training a denoiser in front of a classifier: every method is a gradient source of `deepzero_core.training`.

Batches hold clean images in [0, 1] and the labels that the classifier gives them (`label_table`, `relabelled`).
"""

from deepzero_core.smoothing.methods.boundary import ESTIMATORS, QUERIES, Estimator
from deepzero_core.smoothing.methods.deepzero import DeepZeroDS, denoiser_scores
from deepzero_core.smoothing.methods.first_order_ds import FirstOrderDS
from deepzero_core.smoothing.methods.pretraining import Pretraining
from deepzero_core.smoothing.methods.split import DeepZeroSplit
from deepzero_core.smoothing.methods.zeroth_order_ae_ds import ZerothOrderAEDS, denoiser_and_encoder
from deepzero_core.smoothing.methods.zeroth_order_ds import ZerothOrderDS

__all__ = [
    "ESTIMATORS",
    "QUERIES",
    "DeepZeroDS",
    "DeepZeroSplit",
    "Estimator",
    "FirstOrderDS",
    "Pretraining",
    "ZerothOrderAEDS",
    "ZerothOrderDS",
    "denoiser_and_encoder",
    "denoiser_scores",
]
