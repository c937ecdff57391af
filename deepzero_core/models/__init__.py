"""Networks of the paper, and any the user brings."""

from deepzero_core.models.build import BUILT_IN, build_model
from deepzero_core.models.cnn import CNN
from deepzero_core.models.normalised import Normalised
from deepzero_core.models.resnet import RESNET_DEPTHS, ResNet

__all__ = ["BUILT_IN", "CNN", "RESNET_DEPTHS", "Normalised", "ResNet", "build_model"]
