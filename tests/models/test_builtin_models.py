"""The paper's networks: exact parameter counts, shapes, initial weights that are a function of the seed."""

from typing import Any

import pytest
import torch

from deepzero_core.errors import RequestError
from deepzero_core.models import BUILT_IN, RESNET_DEPTHS, build_model
from deepzero_core.sparsity import maskable_parameters

CIFAR = {"in_channels": 3, "num_classes": 10, "image_size": 32}


def count(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize(("depth", "parameters"), [(1, 730), (2, 3_700), (3, 6_670), (4, 9_640), (5, 12_610)])
def test_cnn_has_the_papers_number_of_parameters(depth: int, parameters: int) -> None:
    assert count(build_model("cnn", depth=depth, **CIFAR)) == parameters


def test_resnet20_has_the_papers_number_of_parameters() -> None:
    module = build_model("resnet20", **CIFAR)
    sizes = {name: value.numel() for name, value in module.named_parameters()}
    assert sum(sizes.values()) == 269_722
    assert sum(sizes[name] for name in maskable_parameters(module)) == 268_336


@pytest.mark.parametrize("depth", RESNET_DEPTHS)
def test_resnet_has_as_many_weighted_layers_as_its_name_says(depth: int) -> None:
    module = build_model(f"resnet{depth}", **CIFAR)
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (2, (9, 13))], ids=str)
def test_scores_have_one_column_per_class(name: str, channels: int, size: int | tuple[int, int]) -> None:
    module = build_model(name, in_channels=channels, num_classes=7, image_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert module(torch.zeros(2, channels, height, width)).shape == (2, 7)


def test_option_a_shortcut_subsamples_and_pads_channels_with_zeros() -> None:
    shortcut = build_model("resnet20", **CIFAR).get_submodule("stage2.0.shortcut")
    x = torch.arange(1.0, 1 + 16 * 4 * 4).view(1, 16, 4, 4)
    y = shortcut(x)
    assert not list(shortcut.parameters())
    torch.testing.assert_close(y[:, 8:24], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_weights_are_a_function_of_the_seed_and_the_global_state_is_untouched(name: str) -> None:
    before = torch.random.get_rng_state()
    first = build_model(name, seed=3, **CIFAR).state_dict()
    torch.rand(5)
    state = torch.random.get_rng_state()
    again, other = (build_model(name, seed=seed, **CIFAR).state_dict() for seed in (3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    torch.random.set_rng_state(before)


@pytest.mark.parametrize(("size", "depth", "deepest"), [(8, 4, 3), (32, 6, 5), ((32, 9), 4, 3), (8, 0, 3)], ids=str)
def test_a_depth_beyond_the_image_is_refused(size: int | tuple[int, int], depth: int, deepest: int) -> None:
    with pytest.raises(RequestError, match=f"depth {depth} .* must be between 1 and {deepest}"):
        build_model("cnn", in_channels=1, num_classes=10, image_size=size, depth=depth)
    fits = build_model("cnn", in_channels=1, num_classes=10, image_size=size, depth=deepest)
    height, width = (size, size) if isinstance(size, int) else size
    assert fits(torch.zeros(2, 1, height, width)).shape == (2, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 1}, "too small for a cnn"),
        ({"image_size": 0}, "image_size must be at least 1, but is 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, but is 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, but is 0"),
        ({"width": 0}, "width of a cnn must be at least 1, but is 0"),
        ({"arguments": {"dropout": 0.5}}, "'cnn' takes no arguments, but was given 'dropout'"),
        ({"name": "cmn"}, "no model 'cmn': did you mean 'cnn'"),
        ({"name": "resnet21"}, "no model 'resnet21': did you mean 'resnet"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_requests_are_answered_with_what_would_be_right(wrong: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {"name": "cnn", **CIFAR, **wrong}
    with pytest.raises(RequestError, match=message):
        build_model(**request)
