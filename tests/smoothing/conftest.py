"""What the tests of the defence share: a smooth classifier, a rectifier network, batches of digits, denoisers."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core.data import BatchSource, ImageStore, prepare
from deepzero_core.models import Autoencoder, Normalised, build_denoiser, build_model
from deepzero_core.smoothing import label_table, relabelled
from deepzero_core.training import Batch, FirstOrderSource, Schedule, Trainer, TrainingSettings


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore.open(prepare("digits", home=tmp_path_factory.mktemp("digits")).path)


@pytest.fixture(scope="session")
def victim(digits: ImageStore) -> nn.Module:
    """The usual classifier, trained on clean digits with first order, in evaluation mode."""
    manifest = digits.manifest
    net = build_model("cnn", in_channels=1, num_classes=10, image_size=8, depth=2, width=12)
    batches = BatchSource(digits.split("train"), batch_size=64, seed=0, mean=manifest.mean, std=manifest.std)
    settings = TrainingSettings(steps=220, schedule=Schedule(0.02, 220), seed=0, optimizer="Adam")
    for _ in Trainer(net, batches, FirstOrderSource(F.cross_entropy), settings).run():
        pass
    return Normalised(net, manifest.mean, manifest.std).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def clean(digits: ImageStore, victim: nn.Module) -> BatchSource:
    """Images in [0, 1] with the victim's labels."""
    split = digits.split("train")
    return BatchSource(relabelled(split, label_table(victim, split)), batch_size=32, seed=1, mean=[0.0], std=[1.0])


@pytest.fixture(scope="session")
def smooth() -> nn.Module:
    """A classifier of 6×5 images without kinks, in float64, whose gradient has all frequencies."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 4))
    return net.double().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def batch(smooth: nn.Module) -> Batch:
    """Eight images of 6×5 pixels with the smooth classifier's labels."""
    images = torch.rand(8, 1, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return Batch.of(3, 0, 3, images, smooth(images).argmax(1))


@pytest.fixture
def denoiser() -> Callable[[], nn.Module]:
    """Builds the same one every time: float64, away from the identity, in training mode."""

    def build() -> nn.Module:
        module = build_denoiser("dncnn", channels=1, image_size=(6, 5), depth=4, width=4, seed=5).double()
        moved = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for value in module.parameters():
                value += 0.1 * torch.randn(value.shape, generator=moved, dtype=value.dtype)
        return module

    return build


@pytest.fixture(scope="session")
def pretrained(clean: BatchSource) -> Callable[[str], nn.Module]:
    """Builds a copy of a float32 denoiser or autoencoder of digits, pre-trained on noisy or clean images."""
    from deepzero_core.smoothing.methods import Pretraining

    built: dict[str, nn.Module] = {}

    def build(name: str) -> nn.Module:
        if name not in built:
            module = build_denoiser(name, channels=1, image_size=8, depth=4, width=8, latent=24, seed=2)
            settings = TrainingSettings(steps=180, schedule=Schedule(0.01, 180), seed=0, optimizer="Adam")
            source = Pretraining(sigma=0.0 if isinstance(module, Autoencoder) else 0.25, seed=0)
            for _ in Trainer(module, clean, source, settings).run():
                pass
            built[name] = module
        return copy.deepcopy(built[name])

    return build


@pytest.fixture
def exact() -> Callable[..., dict[str, Tensor]]:
    """The gradient of the mean stability loss by plain backpropagation, and nothing else of ours in it."""

    def gradient(network: nn.Module, tail: nn.Module, inputs: Tensor, batch: Batch, weight: float = 0.0) -> dict:
        copied = copy.deepcopy(network)
        outputs = copied(inputs)
        loss = F.cross_entropy(tail(outputs), batch.targets)
        if weight:
            loss = loss + weight * (outputs - batch.inputs).square().sum() / len(inputs)
        loss.backward()
        return {name: value.grad for name, value in copied.named_parameters()}

    return gradient
