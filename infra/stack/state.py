"""What is known of the running stack: one file that says where everything listens, and whether it is alive.

No secret is kept here, only the names of files that hold secrets.
"""

import functools
import hashlib
import importlib.util
import ipaddress
import json
import os
import socket
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepzero_core.errors import RequestError, WorkError
from infra.home import home

LOOPBACK = "127.0.0.1"
_ANY = ("0.0.0.0", "::")
_LONGEST_SOCKET_PATH = 100  # the operating systems allow 103 to 107 bytes
_CONNECT_S = 5.0


@dataclass(frozen=True)
class Stack:
    """Where the services of one home listen.

    host: the address that they are bound to. ports: by name, see infra.stack.ports. socket: that of the supervisor.
    workers: how many Dask workers. tls: whether Dask speaks TLS only. secret_files: variable -> file with the secret.
    """

    home: Path
    host: str
    ports: dict[str, int]
    workers: int
    socket: Path
    tls: bool = False
    secret_files: dict[str, str] = field(default_factory=dict)

    @property
    def prefect_ui_url(self) -> str:
        return self._url("prefect")

    @property
    def prefect_api_url(self) -> str:
        return f"{self.prefect_ui_url}/api"

    @property
    def mlflow_url(self) -> str:
        return self._url("mlflow")

    @property
    def dask_address(self) -> str:
        return f"{'tls' if self.tls else 'tcp'}://{bracketed(self.contact)}:{self.ports['dask']}"

    @property
    def dashboard_url(self) -> str:
        """On loopback always: Dask's pages know no passwords. Without bokeh it has tables only."""
        page = "status" if importlib.util.find_spec("bokeh") else "info/main/workers.html"
        return f"http://{LOOPBACK}:{self.ports['dashboard']}/{page}"

    @property
    def contact(self) -> str:
        """The address at which this machine reaches its own services."""
        return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)

    @property
    def folder(self) -> Path:
        return folder(self.home)

    def _url(self, service: str) -> str:
        return f"http://{bracketed(self.contact)}:{self.ports[service]}"


def running(base: Path | None = None) -> Stack | None:
    """The stack of a home (by default the present one) whose supervisor answers, or None.

    Raises:
        RequestError: the home cannot be a folder.
    """
    stack = recorded(home() if base is None else base)
    return stack if stack is not None and _listens(stack.socket) else None


@functools.cache
def joined(base: Path) -> Stack | None:
    """The stack that this process reports to: what ran when it first asked, so that a run never changes its servers."""
    return running(base)


def recorded(base: Path) -> Stack | None:
    """What the state file says, whether or not it is still true; None where there is none that can be read."""
    try:
        entries: dict[str, Any] = json.loads(state_file(base).read_text(encoding="utf-8"))
        return Stack(**{**entries, "home": Path(entries["home"]), "socket": Path(entries["socket"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write(stack: Stack) -> None:
    """Replace the state file in one step.

    Raises:
        WorkError: it cannot be written.
    """
    entries = {**asdict(stack), "home": str(stack.home), "socket": str(stack.socket)}
    try:
        with tempfile.NamedTemporaryFile("w", dir=stack.folder, delete=False, encoding="utf-8") as file:
            json.dump(entries, file, indent=2)
        Path(file.name).replace(state_file(stack.home))
    except OSError as error:
        raise WorkError(f"{state_file(stack.home)} cannot be written: {error.strerror or error}") from error


def forget(base: Path) -> None:
    state_file(base).unlink(missing_ok=True)


def folder(base: Path) -> Path:
    """Everything of the stack: state, configuration, logs."""
    return base / "stack"


def logs(base: Path) -> Path:
    return folder(base) / "logs"


def state_file(base: Path) -> Path:
    return folder(base) / "state.json"


def socket_path(base: Path) -> Path:
    """Where the supervisor of a home listens: in it, or, where that path is too long for a socket, in a private folder
    among the temporary files.

    Raises:
        RequestError: that private folder belongs to somebody else.
    """
    path = folder(base) / "supervisor.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        return path
    private = Path(tempfile.gettempdir()) / f"deepzero-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not private.is_dir() or private.is_symlink():
        raise RequestError(f"{private} must be a folder of yours that nobody else may enter; remove it")
    return private / f"{hashlib.sha256(os.fsencode(base)).hexdigest()[:16]}.sock"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_any(host: str) -> bool:
    """Whether the address stands for all addresses of the machine."""
    return host in _ANY


def bracketed(host: str) -> str:
    """The address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def _listens(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_S)
            probe.connect(str(path))
    except OSError:
        return False
    return True
