"""What must hold before anything is started: each failure is one sentence, and nothing has happened yet."""

import importlib.util
import shutil
from pathlib import Path

from deepzero_core.errors import RequestError
from infra.home import VARIABLE
from infra.stack import state
from infra.stack.secrets import Secrets

SPACE = 500 * 2**20


def prepared_folders(base: Path) -> Path:
    """The home with its folders; RequestError where they cannot be made or hold too little."""
    try:
        state.logs(base).mkdir(parents=True, exist_ok=True)
        state.folder(base).chmod(0o700)
        probe = state.folder(base) / ".writable"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"the home {base} cannot be used: {reason}; set {VARIABLE} to another folder") from error
    check_space(base, SPACE)
    return base


def check_space(base: Path, needed: int) -> None:
    """RequestError where fewer than `needed` bytes are free: databases on a full disk are soon broken ones."""
    free = shutil.disk_usage(base).free
    if free < needed:
        raise RequestError(
            f"{free / 2**20:,.0f} MiB are free at {base}, and the stack needs {needed / 2**20:,.0f} MiB at least; "
            f"make room, or set {VARIABLE} to a folder on another disk"
        )


def check_host(host: str, given: Secrets, insecure: bool) -> None:
    """RequestError where others could reach services that ask them for nothing."""
    if not state.is_loopback(host) and not insecure and given.missing():
        raise RequestError(
            f"--host {host} lets others in, and first {', '.join(given.missing())} must be set "
            "(or …_FILE variables that name files of them); --insecure starts without"
        )


def check_account_forms() -> None:
    """RequestError where MLflow lacks what its user accounts need."""
    if importlib.util.find_spec("flask_wtf") is None:
        raise RequestError("MLflow's user accounts need a package: pip install -c constraints.txt -e '.[auth]'")
