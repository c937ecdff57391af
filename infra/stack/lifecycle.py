"""`up` and `down`: the stack of a home is started once, waited for, and ended without leaving anything behind."""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from deepzero_core.errors import DeepZeroError, RequestError, WorkError
from infra import orchestration
from infra.home import home
from infra.stack import (
    conditions,
    databases,
    health,
    leftovers,
    lost_runs,
    ports,
    secrets,
    services,
    state,
    supervision,
)
from infra.stack.secrets import Secrets
from infra.stack.state import Stack

MLFLOW_USERS = "mlflow-users.db"
_LOCK_S = 600
_POLL_S = 0.5
_FLOW_GRACE_S = 30.0
_GRACE_S = 10.0
# As often as this may a service end before `up` gives up waiting for it.
_FAILED_STARTS = 3

Say = Callable[[str], None]


def default_workers() -> int:
    """One Dask worker per usable core, two at least, as many as the presets ask for, and eight at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(8, max(2, cores))


def up(
    *,
    say: Say,
    host: str = state.LOOPBACK,
    workers: int | None = None,
    fixed: Mapping[str, int] | None = None,
    insecure: bool = False,
    timeout_s: float = 300.0,
) -> Stack:
    """The stack of this home: the one that runs, or a new one, once every service is well.

    Args:
        say: is told what is going on, a line at a time.
        host: the address to bind to. Others than loopback want credentials, unless `insecure`.
        workers: Dask workers. fixed: ports by name. Neither changes a stack that runs.

    Raises:
        RequestError: the home, the host, a port or the credentials will not do; nothing has been started.
        WorkError: a service does not come up; what had been started has been ended again.
    """
    if os.name != "posix":
        raise RequestError("the local stack needs Linux or macOS: its supervisor does not run on this system")
    base = conditions.prepared_folders(home())
    try:
        with FileLock(state.folder(base) / "up.lock", timeout=_LOCK_S):
            found = state.running(base)
            if found is not None:
                say(f"the stack of {base} is running already")
                _tell_differences(found, host, workers, fixed or {}, say)
                _finish(found, secrets.read(found.secret_files), timeout_s, say)
                return found
            return _start(base, host, workers, fixed or {}, insecure, timeout_s, say)
    except Timeout:
        raise WorkError(f"another `deepzero up` has been at work in {base} for {_LOCK_S} s") from None


def down(*, say: Say) -> bool:
    """End the stack of this home, flow runs first and servers last; whether there was anything to end.

    Raises:
        WorkError: processes are left that cannot be ended.
    """
    base = home()
    found = state.running(base)
    ended = found is not None
    if found is not None:
        try:
            say("stopping the flow runs and the Prefect worker")
            # Flow runs that end in order write a checkpoint and tell the servers, which are still there.
            worker = supervision.processes(found)[services.WORKER].pid
            runs = [process for process in leftovers.marked(base, services.WORKER) if process.pid != worker]
            leftovers.end(runs, _FLOW_GRACE_S)
            supervision.stop_service(found, services.WORKER)
            leftovers.end(leftovers.marked(base, services.WORKER), _FLOW_GRACE_S)  # one may have begun in the meantime
            lost_runs.end(found, secrets.read(found.secret_files))
            say("stopping the services")
            supervision.shut_down(found, timeout_s=60.0)
        except DeepZeroError as error:
            say(f"{error}; ending its processes one by one")
    remaining = leftovers.marked(base)
    if remaining:
        if found is None:
            say(f"{len(remaining)} processes of a stack that lost its supervisor are still there; stopping them")
        _end_all(base)
        ended = True
    _clean(base)
    return ended


def _end_all(base: Path) -> None:
    """Flow runs first, as in an orderly end; WorkError where something cannot be ended."""
    leftovers.end(leftovers.marked(base, services.WORKER), _FLOW_GRACE_S)
    leftovers.end(leftovers.marked(base), _GRACE_S)
    still = leftovers.marked(base)
    if still:
        raise WorkError(f"processes {', '.join(str(process.pid) for process in still)} cannot be ended")


def _start(
    base: Path, host: str, workers: int | None, fixed: Mapping[str, int], insecure: bool, timeout_s: float, say: Say
) -> Stack:
    given = secrets.read()
    conditions.check_host(host, given, insecure)
    if insecure and not state.is_loopback(host) and given.missing():
        say(f"WARNING: whoever reaches {host} can run programs here: {', '.join(given.missing())} not set, --insecure")
    if given.mlflow_auth:
        conditions.check_account_forms()
    remaining = leftovers.marked(base)
    if remaining:
        say(f"{len(remaining)} processes of an earlier stack are still there; stopping them")
        _end_all(base)
    _clean(base)
    stack = Stack(
        home=base,
        host=host,
        ports=ports.choose(base, host, fixed),
        workers=default_workers() if workers is None else workers,
        socket=state.socket_path(base),
        tls=bool(given.tls),
        secret_files=secrets.named_files(),
    )
    try:
        _prepare(stack, given, say)
        state.write(stack)
        supervision.start(stack)
        _finish(stack, given, timeout_s, say)
    except BaseException:
        down(say=lambda _: None)
        raise
    return stack


def _prepare(stack: Stack, given: Secrets, say: Say) -> None:
    (stack.folder / "dask").mkdir(exist_ok=True)
    if given.mlflow_auth:
        users = stack.home / MLFLOW_USERS
        (stack.folder / "mlflow-auth.ini").write_text(
            "[mlflow]\n"
            "default_permission = READ\n"
            f"database_uri = sqlite:///{users.as_posix()}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
            encoding="utf-8",
        )
    say("looking at the databases")
    for name in databases.initialise(stack.home, given):
        say(f"{name}'s database is ready")


def _finish(stack: Stack, given: Secrets, timeout_s: float, say: Say) -> None:
    """What is left to do once the supervisor runs, also where an earlier `up` did not get to its end."""
    if supervision.processes(stack)[services.WORKER].state == "stopped":
        _wait(stack, [service.name for service in services.services(stack) if service.at_once], timeout_s, say)
        try_account(stack, given)
        if count := lost_runs.end(stack, given):
            say(f"{count} flow runs of an earlier stack had lost their process and count as crashed now")
        _deploy(stack, given, say)
        supervision.start_service(stack, services.WORKER)
    _wait(stack, [service.name for service in services.services(stack)], timeout_s, say)


def _wait(stack: Stack, wanted: Sequence[str], timeout_s: float, say: Say) -> None:
    """Until these services are well; a line for each as it gets there."""
    begin = time.monotonic()
    first, told = True, set[str]()
    starts: dict[str, set[float]] = {}
    while True:
        rows = [row for row in health.examine(stack) if row.service in wanted]
        elapsed = time.monotonic() - begin
        for row in rows:
            if row.healthy and row.service not in told:
                told.add(row.service)
                if not first:
                    say(f"{row.service} is well after {elapsed:.0f} s")
        waiting = [row.service for row in rows if not row.healthy]
        if not waiting:
            return
        first = False
        for name, process in supervision.processes(stack).items():
            if name in waiting and process.state in ("backoff", "exited", "fatal"):
                starts.setdefault(name, set()).add(process.started)
                if len(starts[name]) >= _FAILED_STARTS or process.state == "fatal":
                    raise WorkError(f"{name} does not start: {_last_words(stack, name)}")
        if elapsed > timeout_s:
            raise WorkError(
                f"not well within {timeout_s:g} s: {', '.join(waiting)}; the logs are in {state.logs(stack.home)}"
            )
        time.sleep(_POLL_S)


def try_account(stack: Stack, given: Secrets) -> None:
    """WorkError where MLflow refuses its own account: it keeps the password with which it was first started."""
    if not given.mlflow_auth:
        return
    account = (given.values[secrets.MLFLOW_USER], given.values[secrets.MLFLOW_PASSWORD])
    if not health.answers(f"{stack.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1", account):
        raise WorkError(
            f"MLflow does not take ${secrets.MLFLOW_USER} and ${secrets.MLFLOW_PASSWORD}: the account was made with "
            f"another password; give that one, or move {stack.home / MLFLOW_USERS} away to make the accounts anew"
        )


def _deploy(stack: Stack, given: Secrets, say: Say) -> None:
    """Make the work pool and the deployments of the flows; a stack without them is of use all the same."""
    # The one place that knows of infra.deployments, which may be absent.
    if importlib.util.find_spec("infra.deployments") is None:
        return
    from infra import deployments

    os.environ.update(services.prefect_client(stack, given.values))
    os.environ.update({**orchestration.SETTINGS, "PREFECT_HOME": str(stack.home / "prefect")})
    try:
        deployments.apply(stack.prefect_api_url)
    except DeepZeroError as error:
        say(f"WARNING: there are no deployments: {given.hide(str(error))}")
    else:
        say("the deployments are there")


def _last_words(stack: Stack, service: str) -> str:
    """The last line of a service's log, and where the rest is. _ready has seen to it that nobody else may read it."""
    file = state.logs(stack.home) / f"{service}.log"
    try:
        lines = [
            line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        lines = []
    said = secrets.read(stack.secret_files).hide(lines[-1])[:300] if lines else "it said nothing"
    return f"{said} (the log is {file})"


def _tell_differences(found: Stack, host: str, workers: int | None, fixed: Mapping[str, int], say: Say) -> None:
    asked = {"host": host, **{f"port of {name}": port for name, port in fixed.items()}}
    has = {"host": found.host, **{f"port of {name}": found.ports[name] for name in fixed}}
    if workers is not None:
        asked["number of workers"], has["number of workers"] = workers, found.workers
    for what in asked:
        if asked[what] != has[what] and (what != "host" or host != state.LOOPBACK):
            say(f"its {what} is {has[what]}, not {asked[what]}: `deepzero down` first")


def _clean(base: Path) -> None:
    """Forget a stack that is gone: a later one must not believe these files."""
    state.forget(base)
    state.socket_path(base).unlink(missing_ok=True)
    for name in ("supervisord.pid", "supervisord.conf", "mlflow-auth.ini"):
        (state.folder(base) / name).unlink(missing_ok=True)
