"""The network that is certified is the one that was given, whatever batch a copy comes in."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core.errors import RequestError
from deepzero_core.models import Normalised, build_model
from deepzero_core.smoothing import Inference
from deepzero_core.smoothing.inference import LEAST, MOST


class Shared(nn.Module):
    """One convolution in front of two normalisations: neither may be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(self.conv(x)) + self.two(self.conv(x)) ** 2).mean((2, 3))


class ReadTwice(Shared):
    """A convolution whose result is also read as it is."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.one(y) + y).mean((2, 3))


class Branching(Shared):
    """Control flow by value, which cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(self.conv(x))
        return (F.relu(y) if y.sum() > 0 else y).mean((2, 3))


class Pooled(nn.Sequential):
    """Poolings of all kinds on images of odd sides."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=2), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, ceil_mode=True),
            nn.MaxPool2d((2, 2)), nn.Flatten(), nn.LazyLinear(4),
        )  # fmt: skip
        self(torch.zeros(1, 3, 17, 17))


def network(name: str) -> nn.Module:
    own = {"shared": Shared, "read twice": ReadTwice, "branching": Branching, "pooled": Pooled}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = own[name]() if name in own else build_model(name, in_channels=3, num_classes=10, image_size=16)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 2)
                nn.init.normal_(part.bias)
                nn.init.normal_(part.running_mean)
                nn.init.uniform_(part.running_var, 0.5, 2)
    return Normalised(module, [0.5] * 3, [0.25] * 3).eval()


SIDES = {"pooled": 17}
NAMES = ("pooled", "cnn", "resnet20", "shared", "read twice", "branching")


@pytest.mark.parametrize("name", NAMES)
def test_its_scores_are_those_of_the_network(name: str) -> None:
    module = network(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    side = SIDES.get(name, 16)
    images = torch.rand(300, 3, side, side, generator=torch.Generator().manual_seed(1))
    fast = Inference(module, images[0])
    with torch.no_grad():
        expected = module(images)
        torch.testing.assert_close(fast(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    folded = not any(isinstance(part, nn.BatchNorm2d) for part in fast.modules())
    assert folded == (name in ("cnn", "resnet20", "pooled"))


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_a_score_does_not_depend_on_the_batch_it_comes_in(name: str) -> None:
    images = torch.rand(70, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    fast = Inference(network(name), images[0])
    assert fast.slice is not None and LEAST <= fast.slice <= MOST
    with torch.no_grad():
        whole = fast(images)
        for size in (1, 7, 32):
            assert torch.equal(torch.cat([fast(part) for part in images.split(size)]), whole)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(RequestError, match=r"cannot take images of shape \[1, 16, 16\]"):
        Inference(network("cnn").net, torch.zeros(1, 16, 16))  # type: ignore[arg-type]


def test_a_module_in_training_mode_is_taken_in_evaluation_mode_and_left_as_it_was() -> None:
    module = network("cnn").train()
    fast = Inference(module, torch.zeros(3, 16, 16))
    assert module.training and not any(part.training for part in fast.net.modules())
