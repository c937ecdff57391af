"""Processes of a stack that outlived their supervisor: each has a mark in its environment, and so have its children."""

import contextlib
import os

import psutil

VARIABLE = "DEEPZERO_STACK"
SERVICE = "DEEPZERO_STACK_SERVICE"


def marked(base: os.PathLike[str] | str, service: str | None = None) -> list[psutil.Process]:
    """Living processes of the stack of this home, or of one of its services; never this process or its parents."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        # Processes of other users cannot be read and are none of ours.
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid in own or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if environment.get(VARIABLE) == os.fspath(base) and service in (None, environment.get(SERVICE)):
                found.append(process)
    return found


def end(processes: list[psutil.Process], grace_s: float) -> None:
    """SIGTERM, and after `grace_s` seconds SIGKILL to whatever is left. psutil never signals a recycled pid."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=10)
