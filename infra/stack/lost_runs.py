"""Flow runs that Prefect believes to go on although their process is gone: killed before it could say so.

Left alone they stay "running" for ever and keep the places of the runs that wait.
"""

import httpx
import psutil

from deepzero_core.errors import WorkError
from infra.stack import secrets, state
from infra.stack.secrets import Secrets
from infra.stack.services import POOL
from infra.stack.state import Stack

_TIMEOUT_S = 30.0
_PAGE = 200  # Prefect's own limit
_GOING_ON = ["PENDING", "RUNNING", "CANCELLING"]
_REASON = "Its process is gone: the stack was taken down, or killed. Run it again; it goes on from its last checkpoint."


def end(stack: Stack, given: Secrets) -> int:
    """Have Prefect know of the pool's runs without a process as crashed; how many there were.

    Not where the stack is open to other machines: their workers' processes cannot be seen from here.

    Raises:
        WorkError: Prefect does not answer as it should.
    """
    if not state.is_loopback(stack.host):
        return 0
    user, _, password = given.values.get(secrets.PREFECT_AUTH, "").partition(":")
    auth = (user, password) if user else None
    asked = {"flow_runs": {"state": {"type": {"any_": _GOING_ON}}}, "work_pools": {"name": {"any_": [POOL]}}}
    crashed = {"state": {"type": "CRASHED", "name": "Crashed", "message": _REASON}, "force": True}
    try:
        # No proxy stands between this machine and itself.
        with httpx.Client(base_url=f"{stack.prefect_api_url}/", auth=auth, timeout=_TIMEOUT_S, trust_env=False) as api:
            answer = api.post("flow_runs/filter", json={**asked, "limit": _PAGE}).raise_for_status()
            lost = [run["id"] for run in answer.json() if not _is_alive(run.get("infrastructure_pid"))]
            for run in lost:
                api.post(f"flow_runs/{run}/set_state", json=crashed).raise_for_status()
    except (httpx.HTTPError, ValueError) as error:
        raise WorkError(f"Prefect cannot be told of lost flow runs: {type(error).__name__}: {error}") from error
    return len(lost)


def _is_alive(pid: str | None) -> bool:
    """Whether a process of Prefect has this number."""
    try:
        return pid is not None and any("prefect" in word for word in psutil.Process(int(pid)).cmdline())
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError):
        return False
