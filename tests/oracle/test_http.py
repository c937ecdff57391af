"""A scoring server over a real socket: right answers, and every way in which it may fail."""

import gc
import json
import pickle
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import torch
from scoring import Reply, Server, drips, images, network, raw, says, sleeps

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.oracle import BlackBoxUnavailableError, HttpOracle, Metered, Retry, logits

ROWS = '{"predictions": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.5]]}'


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_it_answers_what_the_network_answers(server: Server) -> None:
    with torch.no_grad():
        expected = network()(images(5))
    with Metered(server.oracle(batch_size=2)) as box:
        torch.testing.assert_close(box.query(images(5)), expected.double(), rtol=1e-6, atol=1e-6)
        assert box.query(images(5)).dtype == torch.float64
        assert [len(json.loads(body)["inputs"]) for _, _, body in server.requests] == [2, 2, 1] * 2
        assert (box.statistics.examples, box.statistics.calls, box.statistics.retries) == (10, 6, 0)
        assert box.statistics.seconds > 0


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_a_question_arrives_to_the_last_bit(server: Server, kind: torch.dtype) -> None:
    x = (images(3, seed=7).double().abs() * 1e3 / 3).to(kind)
    server.script = [says('{"predictions": [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]}')]
    with server.oracle() as box:
        box.query(x)
    arrived = json.loads(server.requests[0][2])["inputs"]
    assert torch.equal(torch.tensor(arrived, dtype=torch.float64), x.double())
    assert isinstance(arrived[0][0][0][0], float if kind.is_floating_point else int)


PASSING: dict[str, Reply] = {
    "500": says("worker died", 500),
    "503": says("<html>busy</html>", 503),
    "429": says("", 429),
    "408": says("", 408),
    "hangs up": raw(b""),
    "hangs up after the headers": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n"),
    "hangs up within the body": raw(b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"predictions": [['),
    "redirects to no address": says("", 307, Location="http://[::"),
    "is no HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_faults_that_pass_are_waited_out(server: Server, fault: Reply) -> None:
    server.script = [fault, fault, fault]
    told: list[Retry] = []
    with Metered(server.oracle(on_retry=told.append)) as box:
        assert box.query(images(2)).shape == (2, 3)
        assert (box.statistics.examples, box.statistics.calls, box.statistics.retries) == (2, 1, 3)
    assert len(server.requests) == 4
    assert len({body for _, _, body in server.requests}) == 1
    for wait, (least, most) in zip(server.waits, [(0.25, 0.5), (0.5, 1), (1, 2)], strict=True):
        assert least <= wait <= most
    assert [(retry.attempt, retry.seconds) for retry in told] == [(i + 1, wait) for i, wait in enumerate(server.waits)]
    assert all(retry.reason for retry in told)


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0.25, 0.5),
        ("soon", 0.25, 0.5),
        ("-5", 0.25, 0.5),
        (timedelta(seconds=200), 100, 200),
        (format_datetime(datetime(1999, 1, 1, tzinfo=UTC), usegmt=True), 0.25, 0.5),
    ],
    ids=["seconds", "none", "words", "negative", "date", "past date"],
)
def test_the_server_says_how_long_to_wait(server: Server, value: str | timedelta, least: float, most: float) -> None:
    if isinstance(value, timedelta):  # from now on, not from when the tests were collected
        value = format_datetime(datetime.now(UTC) + value, usegmt=True)
    server.script = [says("", 429, Retry_After=value)]
    with server.oracle() as box:
        box.query(images(1))
    assert len(server.waits) == 1
    assert least <= server.waits[0] <= most


@pytest.mark.parametrize("value", ["301", "99999999999999999999"])
def test_a_wait_beyond_all_patience_is_not_begun(server: Server, value: str) -> None:
    server.script = [says("quota", 429, Retry_After=value)]
    with server.oracle() as box, pytest.raises(BlackBoxUnavailableError, match=r"429 \('quota'\) and asks for .* s"):
        box.query(images(1))
    assert server.waits == []


def test_patience_ends(server: Server) -> None:
    server.script = [says("out of memory", 500)] * 100
    with server.oracle(patience=60) as box:
        with pytest.raises(BlackBoxUnavailableError, match=r"/score answered 500 \('out of memory'\); given up, 60 s"):
            box.query(images(1))
        assert box.retries == len(server.waits) == len(server.requests) - 1
    assert 30 < sum(server.waits) <= 60


def test_a_box_that_is_not_there() -> None:
    waits: list[float] = []
    with Metered(HttpOracle(f"http://127.0.0.1:{free_port()}", patience=5, sleep=waits.append), budget=10) as box:
        with pytest.raises(BlackBoxUnavailableError, match="cannot be reached"):
            box.query(images(4))
        assert waits
        assert (box.budget_left, box.statistics.calls, box.statistics.retries) == (10, 0, len(waits))


@pytest.mark.parametrize("fault", [sleeps(20), drips(20)], ids=["silence", "byte by byte"])
def test_a_time_out_is_for_the_whole_request(server: Server, fault: Reply) -> None:
    server.script = [fault]
    told: list[Retry] = []
    with server.oracle(timeout=0.5, on_retry=told.append) as box:
        assert box.query(images(1)).shape == (1, 3)
    assert [retry.reason for retry in told] == ["did not answer within 0.5 s"]


def headers_drip(handler: object, _: bytes) -> None:
    handler.close_connection = True
    for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 1000:
        handler.wfile.write(bytes([letter]))
        if handler.server.place.ended.wait(0.02):
            return


def test_headers_cannot_drip_past_it_either(server: Server) -> None:
    server.script = [headers_drip]
    told: list[Retry] = []
    with server.oracle(timeout=0.5, on_retry=told.append) as box:
        box.query(images(1))
    assert [retry.reason for retry in told] == ["did not answer within 0.5 s"]


WRONG: dict[str, tuple[Reply, type[Exception], str]] = {
    "html": (says("<!doctype html><title>Login</title>"), WorkError, "a page of HTML or XML"),
    "nothing": (says(""), WorkError, "answered nothing"),
    "204": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), WorkError, "answered nothing"),
    "cut short": (says(ROWS[:30]), WorkError, "JSON that is cut short after 30 bytes"),
    "cut short in a number": (says('{"predictions": [[1.0, 2.'), WorkError, "cut short"),
    "text": (says("ok"), WorkError, "'ok', not the JSON"),
    "latin": (says(b"\xff\xfe{}"), WorkError, "not the JSON"),
    "NaN": (says('{"predictions": [[NaN, 1.0, 2.0], [1.0, 2.0, 3.0]]}'), WorkError, "NaN, which is no number"),
    "Infinity": (says('{"predictions": [[1, 2, -Infinity]]}'), WorkError, "-Infinity, which is no number"),
    "1e999": (
        says('{"predictions": [[1e999, 1, 2], [3, 4, 5]]}'),
        WorkError,
        "1 numbers of 6 that are not finite",
    ),
    "endless digits": (says('{"predictions": [[%s, 1, 2], [3, 4, 5]]}' % ("9" * 5000)), WorkError, "not finite"),
    "deep": (says("[" * 100_000), WorkError, "lists within lists without end"),
    "huge": (says(b" " * 3000), WorkError, "more than 2000 bytes, the most that is read"),
    "gzip": (says(b"\x1f\x8b", 200, Content_Encoding="gzip"), WorkError, "the coding 'gzip', which was not asked"),
    "another key": (says('{"prediction": [[1, 2]]}'), RequestError, "no 'predictions' .* did you mean 'prediction'"),
    "a list": (says("[[1, 2], [3, 4]]"), RequestError, "has no 'predictions' .* a list of 2 is there"),
    "labels": (says('{"predictions": [3, 1]}'), RequestError, "a list of 2 with a number in it.* looks like labels"),
    "names": (says('{"predictions": ["cat", "dog"]}'), RequestError, "the text 'cat' in it.* looks like labels"),
    "a label each": (
        says('{"predictions": [[3], [1]]}'),
        RequestError,
        r"of shape \[2, 1\].*looks like labels|at least",
    ),
    "ragged": (says('{"predictions": [[1, 2, 3], [1, 2]]}'), RequestError, "ragged rows, of 2 to 3 numbers"),
    "objects": (says('{"predictions": [{"cat": 1}, {"cat": 0}]}'), RequestError, "keys .'cat'.*path such as"),
    "too deep": (says('{"predictions": [[[1, 2]], [[1, 2]]]}'), RequestError, "a list of 2 at row 0, column 0"),
    "null": (says('{"predictions": [[1, null], [1, 2]]}'), RequestError, "null at row 0, column 1"),
    "true": (says('{"predictions": [[1, 2], [true, 2]]}'), RequestError, "true or false at row 1, column 0"),
    "text for a number": (says('{"predictions": [["1", 2], [1, 2]]}'), RequestError, "the text '1' at row 0"),
    "one row": (says('{"predictions": [[1, 2, 3]]}'), RequestError, r"of shape \[1, 3\]; expected .* \[2, K\]"),
    "no row": (says('{"predictions": []}'), RequestError, r"of shape \[0, 0\]"),
    "no column": (says('{"predictions": [[], []]}'), RequestError, "rows of 0"),
    "no list": (says('{"predictions": null}'), RequestError, "answered null"),
    "400": (says('{"message": "wrong shape"}', 400), RequestError, "refuses .* answered 400 .*wrong shape"),
    "401": (says("no", 401), RequestError, "is the token right"),
    "404": (says("no", 404), RequestError, "is the address right"),
    "413": (says("", 413), RequestError, "a smaller batch_size may help"),
    "302": (says("", 302, Location="http://other.example/x?key=1"), RequestError, "302, to 'http://other.example/x'"),
    "307 here": (says("", 307, Location="/elsewhere"), RequestError, "127.0.0.1.*/elsewhere"),
}


@pytest.mark.parametrize(("reply", "kind", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_one_clear_sentence(
    server: Server, reply: Reply, kind: type[Exception], sentence: str
) -> None:
    server.script = [reply]
    with Metered(server.oracle(max_answer_bytes=200_000 if reply is not WRONG["huge"][0] else 2000)) as box:
        with pytest.raises(kind, match=f"the black box http://127.0.0.1.*{sentence}") as caught:
            box.query(images(2))
        assert type(caught.value) in (RequestError, WorkError)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
        assert server.waits == []
        assert len(server.requests) == 1
        assert box.query(images(2)).shape == (2, 3), "the next question is answered as if nothing had been"


def test_the_number_of_classes_does_not_change(server: Server) -> None:
    server.script = [says(ROWS), says('{"predictions": [[1, 2], [3, 4]]}')]
    with Metered(server.oracle()) as box:
        box.query(images(2))
        with pytest.raises(RequestError, match=r"of shape \[2, 2\]; expected .* \[2, 3\]"):
            box.query(images(2))


TEMPLATES = [
    ({"instances": "$batch"}, "predictions", '{"predictions": [[1, 2.5], [3, 4]]}'),
    ("$batch", "", "[[1, 2.5], [3, 4]]"),
    ({"a": [{"data": "$batch", "k": 5}]}, "outputs.0.data", '{"outputs": [{"data": [[1, 2.5], [3, 4]]}]}'),
    ({"x": "$batch"}, "rows.*.scores", '{"rows": [{"scores": [1, 2.5]}, {"scores": [3, 4]}]}'),
]


@pytest.mark.parametrize(("template", "path", "answer"), TEMPLATES, ids=["instances", "bare", "nested", "objects"])
def test_templates(server: Server, template: object, path: str, answer: str) -> None:
    server.script = [says(answer)]
    with server.oracle(template=template, answer_at=path) as box:
        assert box.query(images(2)).tolist() == [[1, 2.5], [3, 4]]
    expected = json.dumps(template).replace('"$batch"', json.dumps(images(2).tolist()))
    assert json.loads(server.requests[0][2]) == json.loads(expected)


SET_UP: dict[str, tuple[dict[str, object], str]] = {
    "file": ({"url": "file:///etc/passwd"}, "begins with http:// or https://"),
    "ftp": ({"url": "ftp://host/x"}, "begins with http"),
    "no host": ({"url": "http:///x"}, "and a host"),
    "no scheme": ({"url": "localhost:5000"}, "begins with http"),
    "no url": ({"url": "http://[::1"}, "cannot be read"),
    "password": ({"url": "https://me:secret-word@host/x"}, "give it as a token"),
    "no batch": ({"template": {"inputs": 1}}, "holds it 0 times"),
    "two batches": ({"template": ["$batch", "$batch"]}, "holds it 2 times"),
    "keys": ({"template": {1: "$batch"}}, "must be JSON"),
    "no JSON": ({"template": {"x": {1, 2}}}, "must be JSON"),
    "answers": ({"answers": "logit"}, "did you mean 'logits'"),
    "timeout": ({"timeout": 0}, "timeout must be a number above 0"),
    "patience": ({"patience": float("nan")}, "patience must be"),
    "text": ({"timeout": "ten"}, "timeout must be a number above 0, not 'ten'"),
    "batch_size": ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    "secret header": ({"headers": {"authorization": "Bearer x"}}, "secrets come from token_env"),
    "two lines": ({"headers": {"X-A": "a\r\nX-B: b"}}, "plain text on one line"),
    "no variable": ({"token_env": "DEEPZERO_NO_SUCH"}, "DEEPZERO_NO_SUCH, which is not set"),
    "no file": ({"token_file": "nowhere.txt"}, "nowhere.txt cannot be read"),
}


@pytest.mark.parametrize(("settings", "sentence"), SET_UP.values(), ids=SET_UP)
def test_what_cannot_be_set_up(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as caught:
        HttpOracle(**{"url": "http://127.0.0.1/", **settings})
    assert "secret-word" not in str(caught.value)


def test_a_question_that_is_no_json(server: Server) -> None:
    x = images(2)
    x[1, 0, 0, 0] = float("inf")
    with (
        server.oracle() as box,
        pytest.raises(RequestError, match="1 of the 32 numbers of the question are not finite"),
    ):
        box.query(x)
    assert server.requests == []


TOKEN = "tok-3fd91c0a77"


@pytest.mark.parametrize("source", ["env", "file"])
@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
def test_a_token_is_sent_and_shown_nowhere(
    server: Server, source: str, header: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    where = {"token_env": "MY_TOKEN"} if source == "env" else {"token_file": str(tmp_path / "token")}
    told: list[Retry] = []
    box = server.oracle(**where, token_header=header, headers={"X-Tenant": "7"}, on_retry=told.append)
    echo = f'{{"message": "token {TOKEN} has no credit"}}'
    server.script = [says(echo, 503), says(echo, 403), says(f"<p>{TOKEN}"), says("", 302, Location=f"/?{TOKEN}")]
    messages = []
    for _ in range(3):
        with pytest.raises((RequestError, WorkError)) as caught:
            box.query(images(1))
        messages.append(f"{caught.value} {caught.value.__cause__!r}")
    sent = server.requests[0][1]
    assert sent[header] == (f"Bearer {TOKEN}" if header == "Authorization" else TOKEN)
    assert sent["X-Tenant"] == "7"
    shown = [*messages, told[0].reason, repr(box), str(vars(box)), box.identity, str(pickle.dumps(box))]
    assert [text for text in shown if TOKEN in text] == []
    assert "[token]" in told[0].reason
    assert "and the token in it" in messages[1]
    box.close()


def test_a_token_is_not_sent_in_the_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    with pytest.raises(RequestError, match="use https") as caught:
        HttpOracle("http://scores.example/", token_env="MY_TOKEN")
    assert TOKEN not in str(caught.value)
    HttpOracle("http://scores.example/", token_env="MY_TOKEN", plain_token=True)
    HttpOracle("https://scores.example/", token_env="MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", "two words")
    with pytest.raises(RequestError, match="holds spaces"):
        HttpOracle("https://scores.example/", token_env="MY_TOKEN")


def test_it_travels_to_another_process(server: Server) -> None:
    with server.oracle(batch_size=2, sleep=time.sleep) as box:  # a list's method would be another list there
        expected = box.query(images(2))
        other: HttpOracle = pickle.loads(pickle.dumps(box))
    with other:
        assert torch.equal(logits(other, images(2)), expected)
        assert other.identity == box.identity


@pytest.mark.parametrize("how", ["closed", "let go", "let go with all that refers to it"])
def test_no_connection_outlives_its_box(server: Server, how: str) -> None:
    box = server.oracle()
    box.query(images(1))
    (transport,) = box._connections._all
    connected = transport._deadline._socket
    assert connected is not None and connected.fileno() >= 0
    del transport
    if how == "closed":
        box.close()
    elif how != "let go":
        box.itself = box
    del box
    gc.collect()
    assert connected.fileno() == -1


def test_identities_tell_boxes_apart() -> None:
    settings = [{}, {"version": "2"}, {"answer_at": "scores"}, {"template": {"instances": "$batch"}}]
    boxes = [HttpOracle("http://127.0.0.1/a", **setting) for setting in settings]
    boxes += [HttpOracle("http://127.0.0.1/b"), HttpOracle("http://127.0.0.1/a?model=2")]
    assert len({box.identity for box in boxes}) == len(boxes)
    assert "model=2" not in boxes[-1].name


def test_a_self_signed_certificate_is_refused_at_once(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    files = ["-keyout", "key", "-out", "certificate"]
    subprocess.run(["openssl", *request.split(), *files], check=True, capture_output=True, cwd=tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            context.wrap_socket(connection, server_side=True).close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    waits: list[float] = []
    box = HttpOracle(f"https://localhost:{listener.getsockname()[1]}", sleep=waits.append)
    with box, pytest.raises(RequestError, match=r"certificate of the black box .* is not trusted"):
        box.query(images(1))
    assert waits == []
    thread.join(10)
    listener.close()
