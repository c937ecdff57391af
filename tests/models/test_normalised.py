"""Normalisation inside the network."""

import pytest
import torch
from torch import nn

from deepzero_core.errors import RequestError
from deepzero_core.models import Normalised


def test_the_network_sees_normalised_channels() -> None:
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    seen = Normalised(nn.Identity(), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))(images)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 1.0), (0.3, 2.0)]):
        torch.testing.assert_close(seen[:, channel], (images[:, channel] - mean) / std, rtol=1e-6, atol=1e-7)


def test_mean_and_std_are_part_of_the_state_and_not_trained() -> None:
    module = Normalised(nn.Identity(), [0.5], [0.25])
    assert set(module.state_dict()) == {"mean", "std"}
    assert not list(module.parameters())


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [([0.5], [1.0, 1.0], "one number per channel"), ([], [], "one number per channel"), ([0.5], [0.0], "positive")],
)
def test_impossible_statistics_are_refused(mean: list[float], std: list[float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Normalised(nn.Identity(), mean, std)
