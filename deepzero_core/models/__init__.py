"""Networks of the paper, and any the user brings."""

from deepzero_core.models.autoencoder import Autoencoder
from deepzero_core.models.build import BUILT_IN, build_model
from deepzero_core.models.cnn import CNN
from deepzero_core.models.corrector import CORRECTORS, PlainCorrector, ResidualCorrector, build_corrector
from deepzero_core.models.denoisers import DENOISERS, build_denoiser
from deepzero_core.models.dncnn import DnCNN
from deepzero_core.models.normalised import Normalised
from deepzero_core.models.resnet import RESNET_DEPTHS, ResNet
from deepzero_core.models.unet import UNet

__all__ = [
    "BUILT_IN",
    "CNN",
    "CORRECTORS",
    "DENOISERS",
    "RESNET_DEPTHS",
    "Autoencoder",
    "DnCNN",
    "Normalised",
    "PlainCorrector",
    "ResNet",
    "ResidualCorrector",
    "UNet",
    "build_corrector",
    "build_denoiser",
    "build_model",
]
