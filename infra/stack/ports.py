"""Which ports the services listen on: those asked for, those of last time, the customary ones, or any free one."""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from deepzero_core.errors import RequestError, suggest
from infra.stack.state import LOOPBACK, folder

# name -> the customary port. "worker" is the Prefect worker's answer to "are you well?".
CUSTOMARY = {"prefect": 4200, "mlflow": 5000, "dask": 8786, "dashboard": 8787, "worker": 8788}
# These stay on loopback wherever the others are bound: they know no passwords.
PRIVATE = ("dashboard", "worker")


def parse(given: Sequence[str]) -> dict[str, int]:
    """`["mlflow=5001", …]` as a mapping.

    Raises:
        RequestError: a name or a number that is none.
    """
    ports: dict[str, int] = {}
    for item in given:
        name, _, number = item.partition("=")
        if name not in CUSTOMARY:
            raise RequestError(f"--port {item}: there is no port {name!r}; {suggest(name, CUSTOMARY)}")
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 65535:
            raise RequestError(f"--port {item}: give a number from 1 to 65535, such as {name}={CUSTOMARY[name]}")
        if int(number) in ports.values():
            raise RequestError(f"--port {item}: two services cannot share a port")
        ports[name] = int(number)
    return ports


def choose(base: Path, host: str, fixed: Mapping[str, int]) -> dict[str, int]:
    """A free port for every service; they are remembered below `base` for the next time.

    Raises:
        RequestError: a port that was asked for is taken, or the host is no address of this machine.
    """
    remembered = _remembered(base)
    chosen: dict[str, int] = {}
    for name, customary in CUSTOMARY.items():
        address = LOOPBACK if name in PRIVATE else host
        if name in fixed:
            if not is_free(address, fixed[name]):
                raise RequestError(
                    f"port {fixed[name]}, asked for {name}, is taken{_holder(fixed[name])}; "
                    f"name another with --port {name}=NUMBER, or leave the choice to deepzero"
                )
            chosen[name] = fixed[name]
            continue
        taken = {*chosen.values(), *fixed.values()}
        candidates = (port for port in (remembered.get(name), customary) if port is not None and port not in taken)
        free = next((port for port in candidates if is_free(address, port)), None)
        chosen[name] = _any_free(address, taken) if free is None else free
    _file(base).write_text(json.dumps(chosen, indent=2), encoding="utf-8")
    return chosen


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now.

    Raises:
        RequestError: the host is no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port whose last server has just gone counts as free: servers set this, too.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror as error:
        raise RequestError(f"--host {host}: this name has no address; give one of this machine's addresses") from error
    except OverflowError:
        return False
    except OSError as error:
        import errno

        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise RequestError(f"--host {host}: this is no address of this machine; 0.0.0.0 stands for all") from error
        return False
    return True


def remembered(base: Path) -> dict[str, int]:
    """The ports of last time, or the customary ones."""
    return {**CUSTOMARY, **_remembered(base)}


def _remembered(base: Path) -> dict[str, int]:
    try:
        entries = json.loads(_file(base).read_text(encoding="utf-8"))
        return {name: port for name, port in entries.items() if name in CUSTOMARY and isinstance(port, int)}
    except (OSError, ValueError, AttributeError):
        return {}


def _file(base: Path) -> Path:
    return folder(base) / "ports.json"


def _any_free(host: str, taken: set[int]) -> int:
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    while True:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
            port = int(probe.getsockname()[1])
        if port not in taken:
            return port


def _holder(port: int) -> str:
    """Who listens there, as far as this user may know."""
    try:
        connections = psutil.net_connections("tcp")
        pid = next(c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid)
        return f" by process {pid} ({psutil.Process(pid).name()})" if pid != os.getpid() else " by this process"
    except (StopIteration, psutil.Error, OSError):
        return ""
