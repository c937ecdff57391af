"""Correctors of coarse solvers: sizes as published, padding as the problem has it."""

import pytest
import torch

from deepzero_core.errors import RequestError
from deepzero_core.models import PlainCorrector, build_corrector


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [("residual", 3, 260_354), ("plain", 3, 56_898), ("residual", 4, 261_154), ("small", 4, 2_818)],
)
def test_parameters_are_as_many_as_published(name: str, channels: int, parameters: int) -> None:
    network = build_corrector(name, channels)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network(torch.randn(2, channels, 12, 8)).shape == (2, 2, 12, 8)


def test_a_smaller_kernel_has_fewer_parameters_and_an_even_one_is_refused() -> None:
    network = PlainCorrector(4, widths=[8], kernel=3, padding="circular")
    assert sum(parameter.numel() for parameter in network.parameters()) == 9 * 4 * 8 + 8 + 9 * 8 * 2 + 2
    assert network(torch.randn(2, 4, 12, 8)).shape == (2, 2, 12, 8)
    with pytest.raises(RequestError, match="must be odd"):
        PlainCorrector(4, kernel=4)


@pytest.mark.parametrize("name", ["residual", "plain", "small"])
def test_a_periodic_corrector_moves_with_its_fields(name: str) -> None:
    torch.manual_seed(0)
    network, x = build_corrector(name, 4, padding="circular").double(), torch.randn(1, 4, 9, 9, dtype=torch.float64)
    moved = network(x.roll((2, 3), (2, 3)))
    torch.testing.assert_close(moved, network(x).roll((2, 3), (2, 3)))
    bounded = build_corrector(name, 4).double()
    bounded.load_state_dict(network.state_dict())
    assert not torch.allclose(bounded(x), network(x))


def test_first_corrections_are_gentle() -> None:
    torch.manual_seed(0)
    network = build_corrector("residual", 3)
    assert network(torch.randn(4, 3, 16, 16)).std() < 0.1


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("residul", {}, "did you mean 'residual'"),
        ("plain", {"padding": "reflect"}, "unknown padding 'reflect'"),
    ],
)
def test_what_there_is_not_is_refused(name: str, settings: dict, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        build_corrector(name, 3, **settings)
