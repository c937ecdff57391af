"""Models that the user names as package.module:callable."""

from pathlib import Path

import pytest
import torch
from torch import nn

from deepzero_core.errors import RequestError
from deepzero_core.models import build_model

SOURCE = """
import torch
from torch import nn

class Nets:
    @staticmethod
    def linear(features, classes=10):
        return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))

def normalised():
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(64, 10))
    net[1].eval()
    return net

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

def pair():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()

def no_module():
    return [1]

def broken():
    raise ValueError("no weights file\\nsecond line")

constant = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_networks.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "user_networks_damaged.py").write_text("def (", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def build(name: str, **arguments: object) -> nn.Module:
    return build_model(name, in_channels=1, num_classes=10, image_size=8, arguments=arguments, seed=1)


@pytest.mark.usefixtures("package")
def test_callable_is_called_with_the_arguments_and_its_weights_follow_the_seed() -> None:
    state = torch.random.get_rng_state()
    first, second = (build("user_networks:Nets.linear", features=64) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first[1].weight, second[1].weight)


@pytest.mark.usefixtures("package")
def test_the_trial_pass_leaves_modes_and_running_statistics_alone() -> None:
    module = build("user_networks:normalised")
    assert module.training
    assert module[0].training
    assert not module[1].training  # the user froze it
    assert module[0].num_batches_tracked == 0


@pytest.mark.usefixtures("package")
def test_the_trial_pass_gives_lazy_parameters_their_shape() -> None:
    assert build("user_networks:lazy")[1].weight.shape == (10, 64)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("user_networks:", {}, "must have the form 'package.module:callable'"),
        (":linear", {}, "must have the form 'package.module:callable'"),
        ("user_networks_absent:net", {}, "cannot be imported .*ModuleNotFoundError.*PYTHONPATH"),
        ("user_networks_damaged:net", {}, "cannot be imported .*SyntaxError"),
        ("user_networks:normalized", {}, "has no 'normalized'; did you mean 'normalised'"),
        ("user_networks:Nets.liner", {}, "has no 'liner'; did you mean 'linear'"),
        ("user_networks:constant", {}, "must name a callable, but names a int"),
        ("user_networks:no_module", {}, "must return a torch.nn.Module, but returned list"),
        ("user_networks:broken", {}, "failed: ValueError: no weights file$"),
        ("user_networks:Nets.linear", {"feature": 64}, "called with .feature=64. failed: TypeError"),
        ("user_networks:Nets.linear", {"features": 65}, r"cannot take images of shape \[2, 1, 8, 8\]"),
        ("user_networks:Nets.linear", {"features": 64, "classes": 9}, r"scores of shape \[2, 10\].*returned \[2, 9\]"),
        ("user_networks:pair", {}, "but returned tuple"),
    ],
)
def test_what_is_wrong_with_a_users_model_is_said(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(name, **arguments)
