"""A Prefect server that lives as long as one command.

Prefect would start one by itself, in the command's process group: a supervisor or a terminal that stops the group then
stops the server first, and the command finds nobody to tell that it was stopped. This one ends when its standard input
does, however the command that holds the other end has ended, and leaves signals to the command.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

from deepzero_core.errors import WorkError

_PATIENCE_S = 120.0
_END_S = 10.0


def ensure_server() -> None:
    """Start a server for this process where Prefect's settings name none; it ends with the process.

    Raises:
        WorkError: it does not come up.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    process, address = _start()
    # In the environment, so that the processes that a flow starts find it as well.
    os.environ["PREFECT_API_URL"] = f"{address}/api"
    refresh_global_settings_context()
    # After what Prefect's threads have to say at the end: they come later to this list, which is read backwards.
    atexit.register(_stop, process)


def _start() -> tuple["subprocess.Popen[bytes]", str]:
    """The server, once it answers, and its address. WorkError where it does not come up."""
    import httpx

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.temporary_server", str(port)],
        stdin=subprocess.PIPE,
        env={**os.environ, "PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{address}/api/health", timeout=5, trust_env=False).status_code == 200:
                return process, address
        time.sleep(0.1)
    process.kill()
    process.communicate()
    raise WorkError(f"a Prefect server did not come up within {_PATIENCE_S:.0f} s; `deepzero doctor` may know why")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve(port: int) -> None:
    """Serve until standard input ends. In a thread, where uvicorn does not meddle with signals."""
    import uvicorn

    for stopped_with in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(stopped_with, signal.SIG_IGN)
    server = uvicorn.Server(
        uvicorn.Config(
            "prefect.server.api.server:create_app",
            factory=True,
            host="127.0.0.1",
            port=port,
            log_level="error",
            lifespan="on",
            timeout_graceful_shutdown=3,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while thread.is_alive() and sys.stdin.buffer.read1(1 << 16):
        pass
    server.should_exit = True
    thread.join()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
