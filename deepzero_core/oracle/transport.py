"""One request over HTTP that comes to an end: answered, refused, or given up after a stated time."""

import datetime
import email.utils
import math
import os
import random
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.oracle.deadline import Deadline
from deepzero_core.oracle.payload import shown
from deepzero_core.oracle.protocol import BlackBoxUnavailableError
from deepzero_core.oracle.secret import Token

_BUSY = {408, 425, 429}
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_ERROR_BYTES = 64 * 1024
# Of what a server says about a fault, so much is repeated.
_WORDS = 200


@dataclass(frozen=True)
class Limits:
    """How long and how much.

    timeout:        seconds for one request, from the first byte sent to the last received.
    connect:        seconds of these for the connection.
    patience:       seconds for all attempts of one question and the waiting between them.
    answer_bytes:   the longest answer that is read.
    """

    timeout: float = 30.0
    connect: float = 5.0
    patience: float = 300.0
    answer_bytes: int = 16 * 2**20


@dataclass(frozen=True)
class Retry:
    """What is told to whoever wants to know that a box has to be asked again: `seconds` from now, `reason`."""

    name: str
    attempt: int
    seconds: float
    reason: str


class Transport:
    """POST to one address, again and again where the fault may pass: no connection, no answer in time, 429, 5xx.

    Waits grow from half a second to half a minute, each shortened by chance to between a half and the whole, and are as
    long as the server wishes where it says so (Retry-After). Redirects are not followed: a POST with a token belongs
    to the address it was meant for.
    """

    def __init__(
        self,
        name: str,
        url: httpx.URL,
        *,
        headers: Mapping[str, str],
        token: Token,
        limits: Limits,
        on_retry: Callable[[Retry], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name, self.limits, self.retries = name, limits, 0
        self._url, self._headers, self._token = url, dict(headers), token
        self._on_retry, self._sleep = on_retry, sleep
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._closing: weakref.finalize[..., Any] | None = None
        self._process = os.getpid()
        self._deadline = Deadline()
        # Its own: nobody's global generator moves because a server was busy.
        self._jitter = random.Random()

    def send(self, body: bytes) -> bytes:
        """The body of a successful answer (2xx).

        Raises:
            RequestError: the server refuses the request (other 4xx, redirects), or its certificate is not trusted.
            WorkError: an answer too long, or in a coding that was not asked for.
            BlackBoxUnavailableError: patience is at its end.
        """
        with self._lock:
            retrying = Retrying(
                retry=retry_if_exception_type(_Fault),
                wait=self._wait,
                stop=self._stop,
                sleep=self._sleep,
                before_sleep=self._again,
                reraise=True,
            )
            try:
                return retrying(self._once, body)
            except _Fault as fault:
                wait = "" if fault.retry_after is None else f" and asks for {fault.retry_after:g} s before the next try"
                raise BlackBoxUnavailableError(
                    f"the black box {self.name} {fault}{wait}; given up, {self.limits.patience:g} s are the most "
                    "that one question may take"
                ) from None

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        closing, self._client, self._closing = self._closing, None, None
        if closing is not None:
            closing()

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_lock", "_client", "_closing", "_process", "_deadline", "_jitter")
        # Who is to be told lives in this process.
        return {**{key: value for key, value in self.__dict__.items() if key not in dropped}, "_on_retry": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _wait(self, state: RetryCallState) -> float:
        longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(state.attempt_number - 1, 10))
        wait: float = longest * self._jitter.uniform(0.5, 1.0)
        return max(_fault_of(state).retry_after or 0.0, wait)

    def _stop(self, state: RetryCallState) -> bool:
        # A sleep handed in from outside may pass no time.
        passed = max(state.seconds_since_start or 0.0, state.idle_for)
        return passed + state.upcoming_sleep > self.limits.patience

    def _again(self, state: RetryCallState) -> None:
        self.retries += 1
        if self._on_retry is not None:
            self._on_retry(Retry(self.name, state.attempt_number, state.upcoming_sleep, str(_fault_of(state))))

    def _once(self, body: bytes) -> bytes:
        with self._deadline.within(self.limits.timeout) as expired:
            try:
                secret = self._token.headers()
                with self._opened().stream(
                    "POST", self._url, content=body, headers=secret, extensions={"trace": self._deadline.trace}
                ) as response:
                    answer = self._read(response, expired)
                    if 200 <= response.status_code < 300:
                        return answer
                    self._refused(response, answer)
            except httpx.TimeoutException:
                raise self._late() from None
            except httpx.LocalProtocolError as error:
                raise RequestError(
                    f"a header of the black box {self.name} cannot be sent: {self._safe(error)}"
                ) from None
            except httpx.TransportError as error:
                if expired.is_set():
                    raise self._late() from None
                if _distrusted(error):
                    raise RequestError(
                        f"the certificate of the black box {self.name} is not trusted: {self._safe(error)}"
                    ) from None
                raise _Fault(f"cannot be reached ({self._safe(error)})") from None
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
                raise WorkError(f"the request to the black box {self.name} failed: {self._safe(error)}") from None

    def _read(self, response: httpx.Response, expired: threading.Event) -> bytes:
        good = 200 <= response.status_code < 300
        limit = self.limits.answer_bytes if good else _ERROR_BYTES
        coding = response.headers.get("content-encoding", "identity").lower()
        if good and coding not in ("", "identity"):
            raise WorkError(
                f"the black box {self.name} answered in the coding {shown(coding)}, which was not asked for"
            )
        answer = bytearray()
        for chunk in response.iter_raw():
            answer += chunk
            if len(answer) > limit:
                if not good:
                    break
                raise WorkError(
                    f"the black box {self.name} answered more than {limit} bytes, the most that is read: ask for fewer "
                    "examples at once, or raise max_answer_bytes"
                )
        if expired.is_set():
            raise self._late()
        return bytes(answer[:limit])

    def _refused(self, response: httpx.Response, answer: bytes) -> NoReturn:
        status = response.status_code
        words = self._safe(answer.decode("utf-8", "replace"))
        said = f"answered {status}" + (f" ({words})" if words != "''" else "")
        if status in _BUSY or status >= 500:
            raise _Fault(said, _seconds(response.headers.get("retry-after")))
        if 300 <= status < 400:
            location = response.headers.get("location", "")
            with suppress(httpx.InvalidURL, ValueError):
                target = self._url.join(location)
                location = f"{target.scheme}://{target.host}{target.path}"
            raise RequestError(
                f"the black box {self.name} sends the request elsewhere ({status}, to {self._safe(location)}): no "
                "request follows there; if it is where the box is, name that address"
            )
        hints = {401: "is the token right?", 403: "is the token right?", 404: "is the address right?"}
        hints |= {405: "is the address right?", 413: "a smaller batch_size may help"}
        raise RequestError(
            f"the black box {self.name} refuses the request: it {said}{'; ' * (status in hints)}{hints.get(status, '')}"
        )

    def _late(self) -> "_Fault":
        return _Fault(f"did not answer within {self.limits.timeout:g} s")

    def shows_token(self, body: bytes) -> bool:
        """Whether the token stands in what a server answered."""
        token = self._token.read()
        return bool(token) and token.encode() in body

    def _safe(self, text: object) -> str:
        """Foreign words, at their beginning, and never the token among them."""
        plain = str(text)
        with suppress(RequestError):
            token = self._token.read()
            plain = plain.replace(token, "[token]") if token else plain
        return shown(plain, _WORDS)

    def _opened(self) -> httpx.Client:
        if self._client is None or self._process != os.getpid():
            self._process = os.getpid()
            own = {"accept": "application/json", "accept-encoding": "identity", "content-type": "application/json"}
            self._client = httpx.Client(
                headers={**own, **self._headers},
                timeout=httpx.Timeout(self.limits.timeout, connect=min(self.limits.connect, self.limits.timeout)),
                limits=httpx.Limits(max_connections=1),
                follow_redirects=False,
                # A proxy of the environment stands between networks, never before this machine's own servers.
                trust_env=not is_loopback(self._url.host),
            )
            # Of what is let go together the collector may take a socket first: no `__del__` of ours would find it open.
            self._closing = weakref.finalize(self, _close, self._client, self._process)
        return self._client


def _close(client: httpx.Client, process: int) -> None:
    if process == os.getpid():  # what came with a fork is the parent's
        client.close()


class _Fault(Exception):  # noqa: N818 — it never leaves this file
    """What may pass when asked again; its text goes on after the name of the box."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


def _fault_of(state: RetryCallState) -> _Fault:
    error = state.outcome.exception() if state.outcome is not None else None
    return error if isinstance(error, _Fault) else _Fault("failed")


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After, seconds or a date, in seconds from now; None where it says nothing that can be read."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text) if len(text) < 10 else math.inf
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return None
    date = date if date.tzinfo is not None else date.replace(tzinfo=datetime.UTC)
    return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def _distrusted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
