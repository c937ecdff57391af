"""Functions of arrays, of tensors and by name."""

import numpy as np
import pytest
import torch
from scoring import images

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.oracle import FunctionOracle


def sums(x: np.ndarray) -> np.ndarray:
    """[N, …] → [N, 2]; writes into what it is given."""
    assert isinstance(x, np.ndarray)
    x *= 2
    flat = x.reshape(len(x), -1)
    return np.stack([flat.sum(1), flat.max(1)], 1)


def expected() -> torch.Tensor:
    flat = 2 * images(3).flatten(1)
    return torch.stack([flat.sum(1), flat.amax(1)], 1)


@pytest.mark.parametrize("function", [sums, "test_function:sums"], ids=["function", "name"])
def test_it_answers_what_the_function_returns(function: object) -> None:
    x = images(3)
    torch.testing.assert_close(FunctionOracle(function).query(x), expected())
    assert torch.equal(x, images(3))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("takes", ["numpy", "tensor"])
def test_every_type_of_question(kind: torch.dtype, takes: str) -> None:
    seen = []

    def function(x: object) -> list[list[float]]:
        seen.append(type(x))
        return [[float(row.sum()), 0.5] for row in x]

    answer = FunctionOracle(function, takes=takes).query(torch.ones(2, 3).to(kind))
    assert answer.tolist() == [[3.0, 0.5]] * 2
    assert seen == [np.ndarray if takes == "numpy" else torch.Tensor]


RETURNS = {
    "labels": (np.array([0, 1]), "int64 of shape .2.*looks like labels"),
    "whole numbers": (np.array([[0, 1], [1, 0]]), "int64 .*looks like labels"),
    "objects": (np.array([{}, {}]), "an array of object"),
    "ragged": ([[1.0, 2.0], [1.0]], "ragged rows, of 1 to 2"),
    "nothing": (None, "a NoneType"),
    "text": ("abc", "a str"),
}


@pytest.mark.parametrize(("value", "sentence"), RETURNS.values(), ids=RETURNS)
def test_what_is_no_answer(value: object, sentence: str) -> None:
    with pytest.raises(RequestError, match=f"the black box mine answered {sentence}"):
        FunctionOracle(lambda x: value, name="mine").query(images(2))


def test_an_answer_is_a_copy() -> None:
    own = np.zeros((2, 2), np.float32)
    answer = FunctionOracle(lambda x: own).query(images(2))
    own += 1
    assert answer.sum() == 0


def test_what_it_raises_becomes_one_sentence() -> None:
    def broken(x: np.ndarray) -> np.ndarray:
        raise KeyError("licence")

    with pytest.raises(WorkError, match=r"the black box broken failed on a question of shape \[2, 1, 4, 4\]: KeyError"):
        FunctionOracle(broken).query(images(2))


def test_identity() -> None:
    assert FunctionOracle("test_function:sums").identity.startswith("function:test_function:sums::")
    assert FunctionOracle(sums).identity.rsplit(":")[-1] == FunctionOracle(expected).identity.rsplit(":")[-1]
    assert FunctionOracle(sums).identity != FunctionOracle(expected).identity
    assert FunctionOracle(sums, version="2").identity != FunctionOracle(sums).identity
    with pytest.raises(RequestError, match="give it a version"):
        FunctionOracle(lambda x: x).identity  # noqa: B018
    assert FunctionOracle(lambda x: x, version="3").identity


def test_refusals() -> None:
    with pytest.raises(RequestError, match="did you mean 'sums'"):
        FunctionOracle("test_function:sum")
    with pytest.raises(RequestError, match="did you mean 'numpy'"):
        FunctionOracle(sums, takes="nunpy")
    with pytest.raises(RequestError, match="is a callable, not a int"):
        FunctionOracle(3)
