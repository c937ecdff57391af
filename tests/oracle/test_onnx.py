"""Real ONNX files, written here from torch's weights, against torch."""

import pickle
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from scoring import images, network

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.oracle import Metered, OnnxOracle


def write(
    path: Path,
    *,
    batch: int | str = "N",
    kind: int = TensorProto.FLOAT,
    softmax: bool = False,
    outside: bool = False,
    second: bool = False,
    scale: float = 1.0,
) -> Path:
    """The network as a file: its batch axis free or fixed, its weights inside or beside it, a second input."""
    module = network()
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    names = {"w0": module[0].weight, "b0": module[0].bias, "w1": module[3].weight, "b1": module[3].bias * scale}
    weights = [numpy_helper.from_array(value.detach().numpy().astype(dtype), key) for key, value in names.items()]
    nodes = [
        helper.make_node("Conv", ["image", "w0", "b0"], ["h0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h0"], ["h1"]),
        helper.make_node("Flatten", ["h1"], ["h2"]),
        helper.make_node("Gemm", ["h2", "w1", "b1"], ["scores"], transB=1),
        helper.make_node("Softmax", ["scores"], ["probabilities"]),
    ]
    outputs = [helper.make_tensor_value_info(key, kind, [batch, 3]) for key in ("scores", "probabilities")]
    inputs = [helper.make_tensor_value_info("image", kind, [batch, 1, 4, 4])]
    inputs += [helper.make_tensor_value_info("mask", kind, [batch])] * second
    graph = helper.make_graph(nodes, "network", inputs, outputs[::-1] if softmax else outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path, save_as_external_data=outside, size_threshold=0, location=f"{path.name}.data")
    return path


def expected(count: int) -> torch.Tensor:
    with torch.no_grad():
        return network()(images(count))


@pytest.mark.parametrize("batch", ["N", 4, 1], ids=["free", "four", "one"])
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "beside"])
def test_it_answers_what_torch_answers(tmp_path: Path, batch: int | str, outside: bool) -> None:
    with Metered(OnnxOracle(write(tmp_path / "net.onnx", batch=batch, outside=outside))) as box:
        torch.testing.assert_close(box.query(images(6)), expected(6), rtol=1e-5, atol=1e-5)
        assert box.statistics.calls == {"N": 1, 4: 2, 1: 6}[batch]
        assert box.statistics.examples == 6


@pytest.mark.parametrize(
    ("kind", "answers", "tolerance"),
    [
        (TensorProto.FLOAT, torch.float32, 1e-5),
        (TensorProto.FLOAT16, torch.float32, 1e-2),
    ],
    ids=["float32", "float16"],
)
def test_types(tmp_path: Path, kind: int, answers: torch.dtype, tolerance: float) -> None:
    answer = OnnxOracle(write(tmp_path / "net.onnx", kind=kind)).query(images(3).double())
    assert answer.dtype == answers
    torch.testing.assert_close(answer.float(), expected(3), rtol=tolerance, atol=tolerance)


def test_float64(tmp_path: Path) -> None:
    """A linear layer: ONNX Runtime convolves in float32 only."""
    layer = torch.nn.Linear(16, 3, dtype=torch.float64)
    weights = [numpy_helper.from_array(value.detach().numpy(), key) for key, value in layer.named_parameters()]
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["y"], transB=1),
    ]
    shapes = {"x": [None, 1, 4, 4], "y": [None, 3]}
    x, y = (helper.make_tensor_value_info(key, TensorProto.DOUBLE, shape) for key, shape in shapes.items())
    graph = helper.make_graph(nodes, "layer", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "layer.onnx")
    answer = OnnxOracle(tmp_path / "layer.onnx").query(images(3))
    with torch.no_grad():
        torch.testing.assert_close(answer, layer(images(3).double().flatten(1)), rtol=1e-12, atol=1e-12)


def test_outputs_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "net.onnx", softmax=True)
    scores = OnnxOracle(path, output="scores").query(images(3))
    with Metered(OnnxOracle(path, answers="probabilities")) as box:
        torch.testing.assert_close(box.query(images(3)), scores.softmax(1))
    with pytest.raises(RequestError, match="has no output 'score'; did you mean 'scores'"):
        OnnxOracle(path, output="score")


def test_what_torch_exports_itself(tmp_path: Path) -> None:
    path = tmp_path / "exported.onnx"
    with pytest.warns(DeprecationWarning):  # the newer exporter needs a package more
        torch.onnx.export(
            network(),
            (images(1),),
            path,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "N"}},
            opset_version=17,
        )
    torch.testing.assert_close(OnnxOracle(path).query(images(5)), expected(5), rtol=1e-5, atol=1e-5)


def test_identity_covers_the_weights_beside_the_file(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "net.onnx", outside=True, scale=scale)
    one, same, other = (OnnxOracle(tmp_path / name / "net.onnx").identity for name in "abc")
    assert one == same != other
    assert OnnxOracle(tmp_path / "a" / "net.onnx", output="probabilities").identity != one


def test_it_travels_and_opens_again(tmp_path: Path) -> None:
    box = OnnxOracle(write(tmp_path / "net.onnx"))
    answer = box.query(images(2))
    assert torch.equal(pickle.loads(pickle.dumps(box)).query(images(2)), answer)
    box.close()
    assert torch.equal(box.query(images(2)), answer)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "net.onnx")
    with pytest.raises(RequestError, match=r"nowhere\.onnx, which is not there"):
        OnnxOracle(tmp_path / "nowhere.onnx")
    (tmp_path / "text.onnx").write_bytes(b"no protobuf " * 100)
    with pytest.raises(RequestError, match=r"text\.onnx is not a model that ONNX Runtime can read"):
        OnnxOracle(tmp_path / "text.onnx")
    (tmp_path / "half.onnx").write_bytes(path.read_bytes()[:300])
    with pytest.raises(RequestError, match=r"half\.onnx is not a model"):
        OnnxOracle(tmp_path / "half.onnx")
    with pytest.raises(RequestError, match="has no input 'images'; did you mean 'image'"):
        OnnxOracle(path, input="images")
    with pytest.raises((RequestError, WorkError), match=r"net\.onnx failed on a question of shape \[2, 3, 4, 4\]"):
        OnnxOracle(path).query(torch.zeros(2, 3, 4, 4))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RequestError, match=r"pip install 'deepzero\[onnx\]'"):
        OnnxOracle(path)


def test_several_inputs(tmp_path: Path) -> None:
    path = write(tmp_path / "net.onnx", second=True)
    with pytest.raises(RequestError, match=r"has 2 inputs \(image, mask\); one is needed"):
        OnnxOracle(path)


def test_the_first_dtype_matters_to_nobody(tmp_path: Path) -> None:
    box = OnnxOracle(write(tmp_path / "net.onnx"))
    whole = torch.from_numpy(np.arange(32, dtype=np.uint8).reshape(2, 1, 4, 4))
    torch.testing.assert_close(box.query(whole), box.query(whole.double()))
