"""Whatever a server sends, it is scores or one clear sentence: never another exception, never a hang."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scoring import Server, images, raw, says

from deepzero_core.errors import DeepZeroError
from deepzero_core.oracle import Metered

QUICK = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

numbers = st.one_of(st.floats(), st.integers(), st.floats(0, 1))
scalars = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=8))
documents = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["predictions", "outputs", "0", ""]), inner, max_size=3),
    ),
    max_leaves=12,
)
rows = st.lists(st.lists(st.one_of(numbers, scalars), min_size=1, max_size=4), min_size=1, max_size=3)
bodies = st.one_of(
    rows.map(lambda found: json.dumps({"predictions": found}).encode()),
    documents.map(lambda found: json.dumps(found).encode()),
    documents.map(lambda found: json.dumps({"predictions": found}).encode()),
    st.binary(max_size=200),
    st.tuples(rows, st.integers(0, 60)).map(lambda both: json.dumps({"predictions": both[0]}).encode()[: both[1]]),
)
heads = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 429 Slow\r\nRetry-After: \xff\r\n\r\n",
        b"HTTP/1.1 301 Gone\r\nLocation: \x80\r\n\r\n",
        b"HTTP/9.9 200\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 999 \r\n\r\n",
        b"",
    ]
)


def ask(server: Server, answers: str, path: str = "predictions") -> None:
    with Metered(server.oracle(answers=answers, answer_at=path, timeout=5.0, patience=1)) as box:
        try:
            found = box.query(images(2))
        except DeepZeroError as error:
            assert str(error)
            assert "\n" not in str(error)
            assert str(error).isascii() or "…" in str(error)
            assert len(str(error)) < 600
        else:
            assert found.shape[0] == 2
            assert found.shape[1] >= 2
            assert found.isfinite().all()
            if answers == "probabilities":
                assert torch.allclose(found.sum(1), torch.ones(2, dtype=found.dtype), atol=1e-3)


@QUICK
@given(
    body=bodies,
    answers=st.sampled_from(["logits", "probabilities"]),
    status=st.sampled_from([200, 200, 200, 201, 400, 404, 500]),
    path=st.sampled_from(["predictions", "", "predictions.0", "predictions.*.0", "*", "0.outputs"]),
)
def test_any_body(shared_server: Server, body: bytes, answers: str, status: int, path: str) -> None:
    shared_server.script = [says(body, status)] * 20
    ask(shared_server, answers, path)


@QUICK
@given(head=heads, body=st.binary(max_size=100))
def test_any_bytes(shared_server: Server, head: bytes, body: bytes) -> None:
    shared_server.script = [raw(head + body)] * 20
    ask(shared_server, "logits")


@pytest.mark.parametrize("wide", [2, 10])
def test_the_fuzz_would_notice_right_answers(shared_server: Server, wide: int) -> None:
    shared_server.script = [says(json.dumps({"predictions": [[1 / wide] * wide] * 2}))]
    ask(shared_server, "probabilities")
    assert not shared_server.script
