"""A scoring server on loopback that scores as a network does and, where a script says so, misbehaves first."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepzero_core.oracle import HttpOracle, ModuleOracle, as_layer
from deepzero_core.perturb.black_box import BlackBox

Reply = Callable[["Handler", bytes], None]


def network() -> nn.Module:
    """[N, 1, 4, 4] → [N, 3]"""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()


def hide(classifier: nn.Module, batch_size: int = 1024) -> BlackBox:
    """A classifier of which nothing but its answers is seen."""
    return as_layer(ModuleOracle(classifier, batch_size=batch_size))


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


# Made once: a server in this process must not touch the global generator that a test may be watching.
_SERVED = network()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 20
    server: "Listener"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        place = self.server.place
        place.requests.append((self.path, dict(self.headers), body))
        reply = place.script.pop(0) if place.script else score
        reply(self, body)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    place: "Server"

    def handle_error(self, *_: object) -> None:
        """A client that has hung up is what these tests are about."""


@dataclass
class Server:
    """Where it listens, what it does before it scores, what it was asked."""

    url: str = ""
    script: list[Reply] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    waits: list[float] = field(default_factory=list)

    def oracle(self, **settings: Any) -> HttpOracle:
        """It as a black box whose waiting between attempts is written down in `waits` and takes no time."""
        return HttpOracle(self.url, **{"sleep": self.waits.append, "timeout": 10.0, **settings})


def score(handler: Handler, body: bytes) -> None:
    with torch.no_grad():
        scores = _SERVED(torch.tensor(json.loads(body)["inputs"]))
    handler.send(200, json.dumps({"predictions": scores.tolist()}).encode())


def says(body: str | bytes, status: int = 200, **headers: str) -> Reply:
    content = body.encode() if isinstance(body, str) else body
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda handler, _: handler.send(status, content, named)


def raw(content: bytes, *, end: bool = True) -> Reply:
    """These bytes and nothing else, then the end of the connection."""

    def reply(handler: Handler, _: bytes) -> None:
        handler.wfile.write(content)
        handler.close_connection = end

    return reply


def drips(seconds: float) -> Reply:
    """A body that comes byte by byte, each well within any time-out of a single read."""

    def reply(handler: Handler, _: bytes) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        end = time.monotonic() + seconds
        while time.monotonic() < end and not handler.server.place.ended.wait(0.02):
            handler.wfile.write(b" ")

    return reply


def sleeps(seconds: float) -> Reply:
    def reply(handler: Handler, _: bytes) -> None:
        handler.close_connection = True
        handler.server.place.ended.wait(seconds)

    return reply


@contextmanager
def listening() -> Iterator[Server]:
    listener = Listener(("127.0.0.1", 0), Handler)
    place = listener.place = Server(f"http://127.0.0.1:{listener.server_port}/score")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield place
    finally:
        place.ended.set()
        listener.shutdown()
        thread.join()
        listener.server_close()
