"""MLflow's own scoring server, serving a network that this project has logged and that was registered."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scoring import images, network
from serving import Serving
from torch.nn import functional as F

from deepzero_core import behind, cge
from deepzero_core.errors import RequestError
from deepzero_core.oracle import BlackBoxUnavailableError, as_layer, logits, open_oracle


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    server = Serving.of(network(), images(2), tmp_path_factory.mktemp("serving"))
    try:
        yield server
    finally:
        server.kill()


def test_it_answers_what_the_network_answers(serving: Serving) -> None:
    with open_oracle("mlflow", url=serving.url, batch_size=4, price_per_thousand=2.0) as box:
        with torch.no_grad():
            torch.testing.assert_close(box.query(images(10)), network()(images(10)).double(), rtol=1e-5, atol=1e-6)
        found = box.statistics
        assert (found.examples, found.calls, found.retries, found.cost) == (10, 3, 0, 0.02)


def test_the_same_by_a_template(serving: Serving) -> None:
    settings = {"template": {"instances": "$batch"}, "answer_at": "predictions"}
    with (
        open_oracle("http", url=f"{serving.url}/invocations", **settings) as one,
        open_oracle("mlflow", url=serving.url) as other,
    ):
        assert torch.equal(one.query(images(3)), other.query(images(3)))


def test_what_it_refuses_is_one_sentence(serving: Serving) -> None:
    with open_oracle("mlflow", url=serving.url) as box:
        with pytest.raises(RequestError, match=r"refuses the request: it answered 400 .*BAD_REQUEST|INVALID_PARAMETER"):
            box.query(torch.zeros(2, 7))
        assert box.query(images(1)).shape == (1, 3)
    with open_oracle("http", url=f"{serving.url}/nowhere") as box, pytest.raises(RequestError, match="404"):
        box.query(images(1))


def test_a_network_before_it_gets_its_gradient(serving: Serving) -> None:
    torch.manual_seed(0)
    front = torch.nn.Conv2d(1, 1, 3, padding=1)
    labels = torch.tensor([0, 1, 2, 1])
    F.cross_entropy(network()(front(images(4))), labels).backward()
    with open_oracle("mlflow", url=serving.url) as box:
        loss_fn = behind(as_layer(box), F.cross_entropy)
        found = cge(front, images(4), labels, loss_fn, mu=1e-2, difference="central")
    for name, parameter in front.named_parameters():
        torch.testing.assert_close(found.gradients[name], parameter.grad, rtol=1e-2, atol=1e-3)


def test_it_dies_and_what_was_paid_for_stays(serving: Serving, tmp_path: Path) -> None:
    """The last test of this file: nothing listens there afterwards."""
    settings = {"url": serving.url, "cache": tmp_path / "cache", "patience": 1.0, "batch_size": 4}
    with open_oracle("mlflow", **settings) as box:
        paid = logits(box, images(8))
        serving.kill()
        with pytest.raises(BlackBoxUnavailableError, match="cannot be reached"):
            box.query(images(4, seed=9))
        assert torch.equal(logits(box, images(8)), paid)
    with open_oracle("mlflow", **settings) as box:
        assert torch.equal(logits(box, images(8)), paid)
        assert (box.statistics.examples, box.statistics.cached) == (0, 8)
