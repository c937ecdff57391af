"""Logits from any box, and any box behind or inside a network that is trained without its gradient."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scoring import Server, images, network
from torch import nn
from torch.nn import functional as F

from deepzero_core import behind, cge, reference, rge
from deepzero_core.errors import RequestError
from deepzero_core.oracle import FunctionOracle, Metered, ModuleOracle, ResponseCache, as_layer, logits


def softmaxed() -> nn.Module:
    return nn.Sequential(network(), nn.Softmax(1))


def test_softmax_of_them_is_what_the_box_answered() -> None:
    box = ModuleOracle(softmaxed(), answers="probabilities")
    torch.testing.assert_close(logits(box, images(9)).softmax(1), box.query(images(9)), rtol=1e-6, atol=1e-7)
    assert torch.equal(logits(ModuleOracle(network()), images(9)), ModuleOracle(network()).query(images(9)))


@given(weights=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=12).filter(lambda w: sum(w) > 0.1))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_stay_finite(dtype: type, weights: list[float]) -> None:
    p = (np.array(weights) / np.sum(weights)).astype(dtype)
    box = FunctionOracle(lambda x: p[None].repeat(len(x), 0), answers="probabilities")
    found = logits(box, images(2))
    assert found.isfinite().all()
    np.testing.assert_allclose(found.softmax(1).numpy()[0], p, rtol=1e-4, atol=1e-7)


def test_a_floor_keeps_rounded_zeros_from_becoming_mountains() -> None:
    box = FunctionOracle(lambda x: [[1.0, 0.0]] * len(x), answers="probabilities")
    assert logits(box, images(1)).min() < -700
    assert logits(box, images(1), floor=5e-5).min().item() == pytest.approx(np.log(5e-5))
    with pytest.raises(RequestError, match="between 0 and 1"):
        logits(box, images(1), floor=0.0)


def front() -> nn.Module:
    torch.manual_seed(2)
    return nn.Conv2d(1, 1, 3, padding=1).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return images(5).double(), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("place", ["behind", "inside"])
@pytest.mark.parametrize("answers", ["logits", "probabilities"])
def test_gradients_through_a_box_are_those_of_the_reference(place: str, answers: str) -> None:
    module = (network() if answers == "logits" else softmaxed()).double()
    layer = as_layer(Metered(ModuleOracle(module, answers=answers, batch_size=7)))
    if place == "behind":
        whole, loss_fn = front(), behind(layer, F.cross_entropy)
    else:
        whole, loss_fn = nn.Sequential(front(), layer), F.cross_entropy
    found = cge(whole, *data(), loss_fn, mu=1e-5, difference="central")
    expected = reference.cge(whole, *data(), loss_fn, mu=1e-5, difference="central")
    exact = front()
    F.cross_entropy(network().double()(exact(data()[0])), data()[1]).backward()
    for (name, gradient), parameter in zip(found.gradients.items(), exact.parameters(), strict=True):
        torch.testing.assert_close(gradient, expected.gradients[name], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
    assert set(layer.state_dict()) == set(), "a box has no parameters"


def test_a_server_behind_a_network_is_asked_what_the_estimate_needs(server: Server, tmp_path: Path) -> None:
    """Random directions through a real server; the second time every answer comes from the cache, to the same bits."""
    estimates, spent = [], []
    for _ in range(2):
        with Metered(server.oracle(batch_size=16), cache=ResponseCache(tmp_path / "cache")) as box:
            loss_fn = behind(as_layer(box), F.cross_entropy)
            generator = torch.Generator().manual_seed(0)
            estimates.append(rge(front(), *data(), loss_fn, queries=6, mu=1e-3, generator=generator))
            spent.append((box.statistics.examples, box.statistics.cached))
    assert spent[0][0] > 0
    assert spent[1] == (0, sum(spent[0]))
    for name, gradient in estimates[0].gradients.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, estimates[1].gradients[name])


def test_a_layer_travels_to_workers(tmp_path: Path) -> None:
    layer = as_layer(Metered(ModuleOracle(network()), cache=ResponseCache(tmp_path / "cache")))
    there = pickle.loads(pickle.dumps(layer))
    assert torch.equal(there(images(4)), layer(images(4)))
    assert "Sequential" in repr(layer)
