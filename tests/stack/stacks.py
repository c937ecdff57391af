"""Commands, processes and a PostgreSQL for the tests of the local stack: real servers, real signals."""

import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from filelock import FileLock

# What the test session sets for tests that have no servers.
_OF_THE_SESSION = ("PREFECT_", "MLFLOW_", "DEEPZERO_")
UP = FileLock(Path(tempfile.gettempdir()) / f"deepzero-tests-{os.getuid()}.lock")


@dataclass(frozen=True)
class Command:
    """`deepzero` with a home of its own and nothing of this session's settings."""

    home: Path
    settings: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_SESSION)}
        return {**kept, "DEEPZERO_HOME": str(self.home), "COLUMNS": "200", **self.settings}

    def __call__(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        # Of two stacks that start at once each could find the same ports free.
        with UP if arguments[:1] == ("up",) else nullcontext():
            return subprocess.run(
                [sys.executable, "-m", "flows.cli", *arguments],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )

    def processes(self) -> list[psutil.Process]:
        """Every living process that names the home, on its command line or in its environment: without our code."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                words = [*process.cmdline(), *process.environ().values()]
            except psutil.Error:
                continue
            if any(str(self.home) in word for word in words):
                found.append(process)
        return found


def rows(deepzero: Command) -> dict[str, dict[str, Any]]:
    """What `status` says of each service."""
    return {row["service"]: row for row in json.loads(deepzero("status", "--json").stdout)}


def well(deepzero: Command) -> bool:
    return all(row["healthy"] for row in rows(deepzero).values())


def eventually(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Postgres:
    """A server on loopback. password: of the user `deepzero`."""

    port: int
    password: str
    run: Callable[..., subprocess.CompletedProcess[str]]

    def url(self, database: str) -> str:
        return f"postgresql://deepzero:{self.password}@127.0.0.1:{self.port}/{database}"


def postgres_programs() -> Path | None:
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/local/bin")]
    places += [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep)]
    return next((place for place in places if (place / "initdb").is_file() and (place / "postgres").is_file()), None)


def exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answered(method: str, url: str, body: Any = None) -> httpx.Response:
    """A server's answer; one whose database is busy says 503 and is asked again."""
    for _ in range(20):
        answer = httpx.request(method, url, json=body, timeout=30)
        if answer.status_code != 503:
            break
        time.sleep(0.5)
    return answer


def asked(method: str, url: str, body: Any = None) -> Any:
    """What a server of a stack answers."""
    return answered(method, url, body).raise_for_status().json()
