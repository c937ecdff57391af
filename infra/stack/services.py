"""The services of a stack: what each is started with, and how one sees that it is well."""

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.dask_settings import SETTINGS as DASK_SETTINGS
from infra.home import VARIABLE as HOME
from infra.home import mlflow_artifacts, mlflow_database
from infra.orchestration import SETTINGS as PREFECT_SETTINGS
from infra.stack import leftovers, secrets
from infra.stack.secrets import Secrets
from infra.stack.state import LOOPBACK, Stack, bracketed, is_any

POOL = "deepzero"
DASK_ADDRESS = "DEEPZERO_DASK_ADDRESS"
PREFECT, MLFLOW, SCHEDULER, DASK_WORKER, WORKER = "prefect", "mlflow", "dask-scheduler", "dask-worker", "prefect-worker"

# What would lead a service elsewhere: the user's own servers, keys and profiles.
_FOREIGN = ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_PROFILE", "PREFECT_UI_API_URL", "MLFLOW_TRACKING_URI")


@dataclass(frozen=True)
class Service:
    """One program of the stack.

    needs: the service that must be well before this one is started. stop_s: what it gets to end in order.
    runs_on: whether its children may outlive it when it is killed: the flow runs of a Prefect worker go on.
    at_once: whether the supervisor starts it with itself: a Prefect worker waits for the deployments.
    """

    name: str
    needs: str | None = None
    stop_s: int = 20
    runs_on: bool = False
    at_once: bool = True


def services(stack: Stack) -> list[Service]:
    """In the order in which they are started; they are stopped in the reverse one."""
    workers = [Service(f"{DASK_WORKER}-{number}", needs=SCHEDULER) for number in range(1, stack.workers + 1)]
    worker = Service(WORKER, needs=PREFECT, stop_s=30, runs_on=True, at_once=False)
    return [Service(PREFECT), Service(MLFLOW), Service(SCHEDULER), *workers, worker]


def address_of(stack: Stack, service: str) -> str:
    """What a person opens or a program connects to; empty where there is no such thing."""
    return {PREFECT: stack.prefect_ui_url, MLFLOW: stack.mlflow_url, SCHEDULER: stack.dask_address}.get(service, "")


def health_url(stack: Stack, service: str) -> str | None:
    """Answers 200 when the service is well; a Dask worker has none."""
    return {
        PREFECT: f"{stack.prefect_api_url}/health",
        MLFLOW: f"{stack.mlflow_url}/health",
        SCHEDULER: f"http://{LOOPBACK}:{stack.ports['dashboard']}/health",
        WORKER: f"http://{LOOPBACK}:{stack.ports['worker']}/health",
    }.get(service)


def command(stack: Stack, service: str, given: Secrets) -> list[str]:
    """The command line of a service; free of secrets."""
    ports = {name: str(number) for name, number in stack.ports.items()}
    match service:
        case "prefect":
            return _module("prefect", "server", "start", "--host", stack.host, "--port", ports["prefect"])
        case "mlflow":
            options = {
                "--host": stack.host,
                "--port": ports["mlflow"],
                "--workers": "1",
                "--artifacts-destination": mlflow_artifacts(stack.home).as_uri(),
                "--allowed-hosts": ",".join(_host_headers(stack)),
                "--cors-allowed-origins": ",".join(_origins(stack, MLFLOW)),
            }
            auth = ["--app-name", "basic-auth"] if given.mlflow_auth else []
            return _module("mlflow", "server", "--serve-artifacts", *_flat(options), *auth)
        case "dask-scheduler":
            options = {
                "--host": stack.host,
                "--port": ports["dask"],
                "--protocol": "tls" if stack.tls else "tcp",
                "--dashboard-address": f"{LOOPBACK}:{ports['dashboard']}",
            }
            return _module("distributed.cli.dask_scheduler", *_flat(options), "--no-show")
        case "prefect-worker":
            options = {"--pool": POOL, "--type": "process", "--name": "stack"}
            return _module("infra.stack.prefect_worker", "worker", "start", *_flat(options), "--with-healthcheck")
        case _:
            options = {
                "--name": service,
                "--nthreads": "1",
                "--host": stack.host,
                "--memory-limit": "0",
                "--local-directory": str(stack.folder / "dask"),
                # It listens for questions about its health even without a dashboard, and by default to everybody.
                "--dashboard-address": f"{LOOPBACK}:0",
            }
            # The supervisor is its nanny.
            only = ["--no-nanny", "--no-dashboard"]
            return _module("distributed.cli.dask_worker", stack.dask_address, *_flat(options), *only)


def environment(stack: Stack, service: str, given: Secrets) -> dict[str, str]:
    """What a service finds in its environment: this process's, without the secrets that are none of its business."""
    hidden = {*secrets.variables(), *_FOREIGN}
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    common = {
        HOME: str(stack.home),
        leftovers.VARIABLE: str(stack.home),
        leftovers.SERVICE: service,
        "PREFECT_HOME": str(stack.home / "prefect"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONUNBUFFERED": "1",
        **{name: value for name, value in PREFECT_SETTINGS.items() if name not in inherited},
    }
    own = {PREFECT: _prefect, MLFLOW: _mlflow, WORKER: _worker}.get(service, _dask)(stack, given)
    if stack.tls:
        own |= {name: str(path) for name, path in zip(secrets.TLS, given.tls, strict=True)}
    return {**inherited, **common, **own}


def prefect_client(stack: Stack, values: Mapping[str, str]) -> dict[str, str]:
    """What a client of Prefect needs to talk to this stack."""
    own = {"PREFECT_API_URL": stack.prefect_api_url}
    return own | ({secrets.CLIENT_PREFECT_AUTH: values[secrets.PREFECT_AUTH]} if secrets.PREFECT_AUTH in values else {})


def mlflow_client(values: Mapping[str, str]) -> dict[str, str]:
    """What a client of MLflow needs beside its address."""
    return {name: values[name] for name in (secrets.MLFLOW_USER, secrets.MLFLOW_PASSWORD) if name in values}


def prefect_database(values: Mapping[str, str]) -> dict[str, str]:
    """Prefect's setting for a PostgreSQL, which it reaches through asyncpg; nothing where it keeps its SQLite file."""
    if secrets.PREFECT_DATABASE not in values:
        return {}
    return {"PREFECT_API_DATABASE_CONNECTION_URL": with_driver(values[secrets.PREFECT_DATABASE], "asyncpg")}


def mlflow_store(base: Path, values: Mapping[str, str]) -> str:
    """The address of MLflow's tracking store."""
    if secrets.MLFLOW_DATABASE in values:
        return with_driver(values[secrets.MLFLOW_DATABASE], "psycopg2")
    return f"sqlite:///{mlflow_database(base).as_posix()}"


def is_connected(pid: int, port: int) -> bool:
    """Whether a process holds an open connection to that port: a Dask worker to its scheduler."""
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(c.raddr and c.raddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in connections)


def _prefect(stack: Stack, given: Secrets) -> dict[str, str]:
    auth = {name: value for name, value in given.values.items() if name == secrets.PREFECT_AUTH}
    return {
        **prefect_client(stack, given.values),
        # Wherever the page was opened: through a tunnel, a proxy or another name of the machine.
        "PREFECT_UI_API_URL": "/api",
        # The page and its API have one origin; no other site may make a browser talk to it.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(_origins(stack, PREFECT)),
        **prefect_database(given.values),
        **auth,
    }


def _mlflow(stack: Stack, given: Secrets) -> dict[str, str]:
    values = given.values
    own = {
        "MLFLOW_BACKEND_STORE_URI": mlflow_store(stack.home, values),
        # Evaluation jobs of language applications: nothing here uses them, and they cost a process.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    if secrets.MLFLOW_KEY in values:
        own |= {
            secrets.MLFLOW_KEY: values[secrets.MLFLOW_KEY],
            "MLFLOW_AUTH_CONFIG_PATH": str(stack.folder / "mlflow-auth.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": values.get(secrets.MLFLOW_USER, ""),
            "MLFLOW_AUTH_ADMIN_PASSWORD": values.get(secrets.MLFLOW_PASSWORD, ""),
        }
    return own


def _worker(stack: Stack, given: Secrets) -> dict[str, str]:
    return {
        **prefect_client(stack, given.values),
        "MLFLOW_TRACKING_URI": stack.mlflow_url,
        **mlflow_client(given.values),
        DASK_ADDRESS: stack.dask_address,
        "PREFECT_WORKER_WEBSERVER_HOST": LOOPBACK,
        "PREFECT_WORKER_WEBSERVER_PORT": str(stack.ports["worker"]),
    }


def _dask(stack: Stack, given: Secrets) -> dict[str, str]:
    import dask

    # The workers of a run leave signals to whoever leads it; these are ended by the supervisor's.
    settings = {**DASK_SETTINGS, "distributed.worker.preload": []}
    if stack.tls:
        authority, certificate, key = map(str, given.tls)
        settings |= {"distributed.comm.tls.ca-file": authority, "distributed.comm.require-encryption": True}
        for role in ("scheduler", "worker", "client"):
            settings |= {f"distributed.comm.tls.{role}.cert": certificate, f"distributed.comm.tls.{role}.key": key}
    with dask.config.set(settings):
        return {"DASK_INTERNAL_INHERIT_CONFIG": dask.config.serialize(dask.config.global_config)}


def _names(stack: Stack) -> list[str]:
    """The names under which a browser may ask for pages: any other one could be an attacker's."""
    names = ["localhost", LOOPBACK, "::1", stack.host]
    if is_any(stack.host):
        addresses = [address for interface in psutil.net_if_addrs().values() for address in interface]
        names += [found.address for found in addresses if found.family in (socket.AF_INET, socket.AF_INET6)]
        names += [socket.gethostname(), socket.getfqdn()]
    return [bracketed(name) for name in dict.fromkeys(names) if not is_any(name) and "%" not in name]


def _host_headers(stack: Stack) -> list[str]:
    """On any port, for those who come through a tunnel; `[` begins a set of characters in MLflow's patterns."""
    more = [name for name in os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS", "").split(",") if name]
    return [*more, *(pattern for name in _names(stack) for pattern in (name, f"{name.replace('[', '[[]', 1)}:*"))]


def _origins(stack: Stack, port: str) -> list[str]:
    return [f"http://{name}:{stack.ports[port]}" for name in _names(stack)]


def with_driver(url: str, driver: str) -> str:
    """The address as SQLAlchemy wants it for this driver; without one, as PostgreSQL's own library does."""
    return f"postgresql{driver and '+'}{driver}://{url.partition('://')[2]}"


def _module(*parts: str) -> list[str]:
    return [sys.executable, "-m", *parts]


def _flat(options: Mapping[str, str]) -> list[str]:
    return [part for pair in options.items() for part in pair]
