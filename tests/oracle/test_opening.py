"""Black boxes from plain settings."""

from pathlib import Path

import pytest
import torch
from scoring import Server, images, network, says

from deepzero_core.errors import RequestError
from deepzero_core.oracle import KINDS, ModuleOracle, open_oracle, settings_of


def test_a_module_with_everything_around_it(tmp_path: Path) -> None:
    settings = {"module": "scoring:network", "batch_size": 4, "budget": 10, "price_per_thousand": 2.0, "classes": 3}
    for _ in range(2):
        with open_oracle("module", cache=tmp_path / "cache", account=(tmp_path / "account", "run"), **settings) as box:
            assert torch.equal(box.query(images(6)), ModuleOracle(network()).query(images(6)))
    with open_oracle("module", account=(tmp_path / "account", "run"), **settings) as box:
        assert (box.statistics.examples, box.statistics.cached, box.statistics.cost) == (6, 6, 0.012)
        assert box.budget_left == 4


def test_servers(server: Server) -> None:
    server.script = [says("[[1, 2.5]]")]
    with open_oracle("http", url=server.url, template="$batch", answer_at="", name="mine") as box:
        assert box.query(images(1)).tolist() == [[1, 2.5]]
        assert box.name == "mine"
    for url in (server.url, f"{server.url}/", f"{server.url}/invocations"):
        with open_oracle("mlflow", url=url) as box:
            box.query(images(1))
    assert [path for path, _, _ in server.requests] == ["/score", *["/score/invocations"] * 3]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_its_settings(kind: str) -> None:
    settings = settings_of(kind)
    needed = [key for key, must in settings.items() if must]
    assert len(needed) == 1
    assert {"answers", "batch_size", "name", "budget"} <= set(settings)
    with pytest.raises(RequestError, match=f"a black box of kind '{kind}' needs the setting '{needed[0]}'"):
        open_oracle(kind)
    with pytest.raises(RequestError, match="has no setting 'bugdet': did you mean 'budget'"):
        open_oracle(kind, bugdet=5)


def test_refusals() -> None:
    with pytest.raises(RequestError, match="no black box of kind 'onx': did you mean 'onnx'"):
        open_oracle("onx")
    with pytest.raises(RequestError, match="a cache cannot tell"):
        open_oracle("function", function=lambda x: x, cache="never-made.sqlite")
    assert not Path("never-made.sqlite").exists()
