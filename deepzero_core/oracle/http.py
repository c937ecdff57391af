"""A scoring server as a black box: MLflow's own, or any that takes a batch in JSON and answers in JSON."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from torch import Tensor

from deepzero_core.errors import DeepZeroError, RequestError
from deepzero_core.oracle.answers import from_lists
from deepzero_core.oracle.connections import Connections
from deepzero_core.oracle.payload import BATCH, check_template, decode, encode, pick
from deepzero_core.oracle.protocol import Answers, answers_named, question
from deepzero_core.oracle.secret import Token
from deepzero_core.oracle.settings import count, positive
from deepzero_core.oracle.transport import Limits, Retry, Transport, is_loopback

_MLFLOW: Mapping[str, str] = {"inputs": BATCH}
_OWN_HEADERS = {"authorization", "proxy-authorization", "cookie", "host", "content-length", "transfer-encoding"}


class HttpOracle:
    """A server that scores a batch with one POST. It answers in float64: what JSON says, to its last decimal.

    Args:
        url: where to post to, http or https. A query string may be part of it and is never shown.
        answers: "logits" or "probabilities".
        template: JSON with "$batch" where the batch goes as nested lists; by default MLflow's {"inputs": "$batch"}.
        answer_at: the dotted path to the rows in the answer, as "predictions" or "outputs.0.data" or
            "predictions.*.scores" (the scores of each of a list of objects); "" where the answer is the rows.
        batch_size: the most examples of one query; None: any number, however long the request becomes.
        concurrency: the most requests at the same time, each over a connection of its own.
        headers: further headers. Whatever is secret belongs into the token: headers are shown in configurations.
        token_env, token_file: the environment variable or the file that holds the token, read when a request is sent.
        token_header: its header: "Authorization" (after the word Bearer) or one of the service's own.
        plain_token: send the token over http to another machine all the same, where anybody on the way can read it.
        timeout: seconds for one request, whole.
        connect_timeout: seconds of these for the connection.
        patience: seconds for all attempts at one question and the waiting between them; then the box counts as gone.
        max_answer_bytes: the longest answer that is read.
        name: what messages call it; by default its address.
        version: tells a service from the one that stood at this address before, to a cache.
        on_retry: called before each wait, in this process.
        sleep: the waiting itself.

    Raises:
        RequestError: an address, a template, a header or a number that cannot be used; no token where it should be.
    """

    def __init__(
        self,
        url: str,
        *,
        answers: Answers = "logits",
        template: Any = None,
        answer_at: str = "predictions",
        batch_size: int | None = 128,
        concurrency: int = 1,
        headers: Mapping[str, str] | None = None,
        token_env: str | None = None,
        token_file: str | None = None,
        token_header: str = "Authorization",
        plain_token: bool = False,
        timeout: float = 30.0,
        connect_timeout: float = 5.0,
        patience: float = 300.0,
        max_answer_bytes: int = 16 * 2**20,
        name: str | None = None,
        version: str = "",
        on_retry: Callable[[Retry], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        address = _address(url)
        self.name = name or f"{address.scheme}://{address.netloc.decode('ascii')}{address.path}"
        self.answers = answers_named(answers)
        self.batch_size = count("batch_size", batch_size)
        self.concurrency = count("concurrency", concurrency) or 1
        self._template = dict(_MLFLOW) if template is None else template
        check_template(self._template)
        self._answer_at = answer_at
        token = Token(token_env, token_file, token_header)
        if token.read() and address.scheme == "http" and not is_loopback(address.host) and not plain_token:
            raise RequestError(
                f"the token of the black box {self.name} could be read by anybody on the way: use https, or say "
                "plain_token=True where the network is your own"
            )
        limits = Limits(
            timeout=positive("timeout", timeout),
            connect=positive("connect_timeout", connect_timeout),
            patience=positive("patience", patience),
            answer_bytes=count("max_answer_bytes", max_answer_bytes) or 0,
        )
        plain = _plain(headers or {})
        self._connections = Connections(
            self.concurrency,
            lambda: Transport(
                self.name, address, headers=plain, token=token, limits=limits, on_retry=on_retry, sleep=sleep
            ),
        )
        what = json.dumps([str(address), self._template, answer_at, version])
        self.identity = f"http:{hashlib.blake2b(what.encode(), digest_size=32).hexdigest()}"

    @classmethod
    def mlflow(cls, url: str, **settings: Any) -> "HttpOracle":
        """What `mlflow models serve` serves: the address of the server, with or without /invocations.

        The model's signature should name a tensor of floats, or MLflow hands it float64; what it predicts must be rows
        of scores, not labels.
        """
        path = url.rstrip("/")
        return cls(path if path.endswith("/invocations") else f"{path}/invocations", **settings)

    @property
    def retries(self) -> int:
        """How often a request has been sent again so far."""
        return self._connections.retries

    def query(self, batch: Tensor) -> Tensor:
        """See `Oracle.query`; raises BlackBoxUnavailableError when patience is at its end."""
        x = question(self, batch)
        body = self._connections.send(encode(self._template, x))
        try:
            return from_lists(self.name, pick(self.name, decode(self.name, body), self._answer_at), len(x))
        except DeepZeroError as error:
            if not self._connections.shows_token(body):
                raise
            raise type(error)(
                f"the black box {self.name} answered something other than scores, and the token in it: it is not shown"
            ) from None

    def close(self) -> None:
        """Close the connections; the next query opens another."""
        self._connections.close()

    def __enter__(self) -> "HttpOracle":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"HttpOracle({self.name}, answers={self.answers!r}, batch_size={self.batch_size})"


def _address(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise RequestError("the url of a black box cannot be read; it looks like http://127.0.0.1:5000/score") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise RequestError(
            f"the url of a black box begins with http:// or https:// and a host, not with {address.scheme!r}"
        )
    if address.userinfo:
        raise RequestError(
            f"the url of the black box at {address.host} holds a name or a password, which would be shown: "
            "give it as a token (token_env, token_file)"
        )
    return address


def _plain(headers: Mapping[str, str]) -> dict[str, str]:
    for key, value in headers.items():
        if str(key).lower() in _OWN_HEADERS:
            raise RequestError(
                f"the header {key!r} cannot be given among the headers: secrets come from token_env or token_file, "
                "and the rest is the request's own"
            )
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise RequestError(f"the header {key!r} must be plain text on one line")
    return dict(headers)
