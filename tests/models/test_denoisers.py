"""Denoisers: the published size, every image size, the identity at the start, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from deepzero_core.errors import RequestError
from deepzero_core.models import DENOISERS, Autoencoder, build_denoiser


def build(name: str, channels: int = 1, size: int | tuple[int, int] = 8, **arguments: Any) -> nn.Module:
    return build_denoiser(name, **{"channels": channels, "image_size": size, "latent": 12, **arguments})


def images(channels: int, size: int | tuple[int, int]) -> torch.Tensor:
    shape = (size, size) if isinstance(size, int) else size
    return torch.rand(3, channels, *shape, generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_dncnn_has_the_published_number_of_parameters() -> None:
    assert count(build("dncnn", channels=3, size=32)) == 558_400
    assert count(build("dncnn", depth=5, width=16)) == 160 + 3 * (2_304 + 32) + 144


def test_dncnn_is_built_as_published() -> None:
    layers = list(build("dncnn", depth=6, width=8).modules())
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(1e-4, 0.95)] * 4
    assert [layer.bias is not None for layer in convolutions] == [True] + [False] * 5
    for layer in convolutions[1:-1]:
        rows = layer.weight.flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dncnn", "unet"])
def test_residual_denoisers_start_as_the_identity_and_can_leave_it(name: str) -> None:
    denoiser, x = build(name, channels=2, size=(9, 11)), images(2, (9, 11))
    assert torch.equal(denoiser(x), x)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        denoiser(x).square().mean().backward()
        optimizer.step()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in denoiser.parameters())
    assert not torch.equal(denoiser(x), x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (2, (9, 13)), (1, (15, 8)), (3, 33)], ids=str)
@pytest.mark.parametrize("name", DENOISERS)
def test_images_of_any_size_come_back_in_their_shape(
    name: str, channels: int, size: int | tuple[int, int], training: bool
) -> None:
    x = images(channels, size)
    assert build(name, channels, size, depth=3, width=4).train(training)(x).shape == x.shape


@pytest.mark.parametrize("size", [8, (11, 23), 64], ids=str)
def test_encoder_and_decoder_are_the_two_halves_of_the_autoencoder(size: int | tuple[int, int]) -> None:
    autoencoder, x = build("autoencoder", 3, size, latent=7, width=4).eval(), images(3, size)
    assert isinstance(autoencoder, Autoencoder)
    latent = autoencoder.encoder(x)
    assert latent.shape == (3, autoencoder.latent) == (3, 7)
    assert torch.equal(autoencoder.decoder(latent), autoencoder(x))


def test_the_linear_layers_of_an_autoencoder_do_not_grow_with_the_image() -> None:
    def linear(size: int) -> list[tuple[int, ...]]:
        layers = build("autoencoder", 1, size, width=4).modules()
        return [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear)]

    assert linear(32) == linear(256) == [(12, 256), (256, 12)]


@pytest.mark.parametrize("name", DENOISERS)
def test_weights_are_a_function_of_the_seed_and_the_global_state_is_untouched(name: str) -> None:
    state = torch.random.get_rng_state()
    first = build(name, seed=3).state_dict()
    torch.random.set_rng_state(state)
    torch.rand(5)
    moved = torch.random.get_rng_state()
    again, other = (build(name, seed=seed).state_dict() for seed in (3, 4))
    assert torch.equal(torch.random.get_rng_state(), moved)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_denoiser_of_ones_own_is_called_with_its_arguments() -> None:
    module = build("torch.nn:Conv2d", arguments={"in_channels": 1, "out_channels": 1, "kernel_size": 3, "padding": 1})
    assert isinstance(module, nn.Conv2d)
    assert module.training


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("dncn", {}, "no denoiser 'dncn': did you mean 'dncnn'?"),
        ("dncnn", {"depth": 1}, "depth of at least 2 .* was given 1"),
        ("dncnn", {"width": 0}, "width of at least 1, but was given 17 and 0"),
        ("unet", {"depth": 0}, "at least 1, but was given depth 0"),
        ("unet", {"channels": 0}, "channels must be at least 1, but is 0"),
        ("autoencoder", {"size": (7, 9)}, "7×9 pixels are too small for an autoencoder: 8×8 is the least"),
        ("autoencoder", {"latent": 0}, "a latent and a width of at least 1, but was given 0 and 32"),
        ("unet", {"arguments": {"a": 1}}, "denoiser 'unet' takes no arguments, but was given 'a'"),
        ("torch.nn:Flatten", {}, r"into images of shape \[2, 1, 8, 8\], but returned \[2, 64\]"),
        ("torch.nn:Conv3", {}, "'torch.nn' has no 'Conv3'"),
        ("torch.nn:Conv2d", {}, r"called with \(\) failed: TypeError"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused(name: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(name, **wrong)
