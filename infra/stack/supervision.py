"""The supervisor: supervisord restarts what dies and keeps the logs short; one speaks to it through a socket."""

import os
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepzero_core.errors import RequestError, WorkError
from infra.stack import leftovers, secrets, services
from infra.stack.state import Stack, logs

_ANSWER_S = 10.0
_START_S = 60.0
# Again and again, a second later each time: a disk that was full for an hour is no reason to stay down for the weekend.
_RETRIES = 100
# A service that ends sooner has not started.
_STARTED_S = 10
_LOG_BYTES, _LOG_COPIES = "10MB", 3


@dataclass(frozen=True)
class Process:
    """state: the supervisor's word, in small letters. pid: 0 where none runs. started: seconds of the wall clock.

    complaint: why it does not run, as far as the supervisor knows.
    """

    state: str
    pid: int
    started: float
    uptime_s: float
    complaint: str


def configuration(stack: Stack) -> str:
    """The text of supervisord's configuration file. It holds no secrets."""
    folder = logs(stack.home)
    sections = {
        "unix_http_server": {"file": stack.socket, "chmod": "0700"},
        "supervisord": {
            "logfile": folder / "supervisord.log",
            "logfile_maxbytes": _LOG_BYTES,
            "logfile_backups": _LOG_COPIES,
            "pidfile": stack.folder / "supervisord.pid",
            "identifier": "deepzero",
            # Asked for where it is root that runs it, and meaningless elsewhere.
            **({"user": "root"} if os.getuid() == 0 else {}),
        },
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
    }
    for number, service in enumerate(services.services(stack), start=1):
        command = [sys.executable, "-m", "infra.stack.launch", str(stack.home), service.name]
        sections[f"program:{service.name}"] = {
            "command": shlex.join(command),
            "priority": number,
            "autostart": str(service.at_once).lower(),
            "autorestart": "true",
            "startsecs": _STARTED_S,
            "startretries": _RETRIES,
            "stopwaitsecs": service.stop_s,
            "stopasgroup": "true",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": folder / f"{service.name}.log",
            "stdout_logfile_maxbytes": _LOG_BYTES,
            "stdout_logfile_backups": _LOG_COPIES,
        }
    lines = []
    for name, options in sections.items():
        # A per cent sign would begin a reference to a variable.
        lines += [f"[{name}]", *(f"{key}={str(value).replace('%', '%%')}" for key, value in options.items()), ""]
    return "\n".join(lines)


def start(stack: Stack) -> None:
    """Start supervisord, and with it every service, in the background.

    Raises:
        RequestError: the path of the home cannot stand in a configuration file.
        WorkError: supervisord does not start.
    """
    if any(sign in str(stack.home) for sign in (";", "\n", "\r")):
        raise RequestError(f"the home {str(stack.home)!r} has a semicolon or a line break in its name; choose another")
    file = stack.folder / "supervisord.conf"
    file.write_text(configuration(stack), encoding="utf-8")
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(file)]
    # Paths that are relative to this folder would be looked for in another one.
    files = {f"{name}_FILE": path for name, path in secrets.named_files().items()} | secrets.tls_files()
    environment = {**os.environ, **files, leftovers.VARIABLE: str(stack.home), leftovers.SERVICE: "supervisor"}
    try:
        done = subprocess.run(
            command,
            cwd=stack.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_START_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise WorkError(f"supervisord did not start within {_START_S:g} s") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        raise WorkError(f"supervisord did not start: {secrets.read(stack.secret_files).hide(said)[:300]}")


def processes(stack: Stack) -> dict[str, Process]:
    """What runs, by service.

    Raises:
        WorkError: the supervisor does not answer.
    """
    return {
        entry["name"]: Process(
            state=str(entry["statename"]).lower(),
            pid=int(entry["pid"]),
            started=float(entry["start"]),
            uptime_s=float(max(0, entry["now"] - entry["start"])),
            complaint=str(entry["spawnerr"]),
        )
        for entry in _call(stack.socket, "getAllProcessInfo")
    }


def start_service(stack: Stack, service: str) -> None:
    """Have one service started that is not. WorkError as `processes`."""
    _call(stack.socket, "startProcess", service, False)


def stop_service(stack: Stack, service: str) -> None:
    """Have one service ended and not started again; nothing where it does not run. WorkError as `processes`."""
    if processes(stack).get(service, Process("stopped", 0, 0, 0, "")).pid:
        _call(stack.socket, "stopProcess", service, timeout_s=60.0)


def shut_down(stack: Stack, timeout_s: float) -> None:
    """Have the supervisor end every service and itself; WorkError where it does not within `timeout_s` seconds."""
    _call(stack.socket, "shutdown")
    deadline = time.monotonic() + timeout_s
    while stack.socket.exists():
        if time.monotonic() > deadline:
            raise WorkError(f"the supervisor did not end within {timeout_s:g} s")
        time.sleep(0.1)


def _call(socket: Path, method: str, *arguments: Any, timeout_s: float = _ANSWER_S) -> Any:
    from supervisor.xmlrpc import SupervisorTransport, UnixStreamHTTPConnection

    class Connection(UnixStreamHTTPConnection):  # type: ignore[misc]
        """With a time-out, which supervisor's own has not."""

        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(timeout_s)

    def connection() -> Connection:
        made = Connection("localhost")
        made.socketfile = str(socket)
        return made

    transport = SupervisorTransport(serverurl=f"unix://{socket}")
    transport._get_connection = connection
    try:
        proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
        return getattr(proxy.supervisor, method)(*arguments)
    except (OSError, xmlrpc.client.Error) as error:
        raise WorkError(f"the stack's supervisor does not answer: {error}; `deepzero down` cleans up") from error
    finally:
        transport.close()
