"""Clusters that come and go with a run: the library of each kind, told what the cluster file says.

Every worker is one process that computes on one thread.
"""

import logging
import math
import uuid
from collections.abc import Callable
from importlib import import_module
from typing import Any

from distributed import LocalCluster as DaskLocalCluster
from distributed.deploy.cluster import Cluster

from configs.clusters import CudaWorkers, KubernetesPods, LocalCluster, SlurmJobs
from deepzero_core.errors import RequestError, WorkError
from infra.transport_security import security_of

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_KUBERNETES_CLUSTER = "dask_kubernetes.operator"


def launch(spec: LocalCluster | SlurmJobs | KubernetesPods | CudaWorkers, workers: int, timeout_s: float) -> Cluster:
    """A cluster that has been asked for `workers` workers; to be closed by the caller.

    Raises:
        RequestError: the library is not installed.
        WorkError: the library could not start it; its reason is given.
    """
    start: Callable[[Any, int, float], Cluster] = _STARTS[type(spec)]
    try:
        return start(spec, workers, timeout_s)
    except (RequestError, WorkError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise WorkError(f"no cluster of kind {spec.kind!r} could be started: {reason}") from error


def _local(spec: LocalCluster, workers: int, timeout_s: float) -> Cluster:
    return DaskLocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",  # without one, Dask takes port 8787, and warns where it is taken
        memory_limit=spec.memory or 0,
        silence_logs=logging.CRITICAL,  # what matters of a lost worker reaches the client and is told once
    )


def _slurm(spec: SlurmJobs, workers: int, timeout_s: float) -> Cluster:
    cluster = _library("dask_jobqueue", "slurm").SLURMCluster(**slurm_arguments(spec, timeout_s))
    cluster.scale(n=workers)
    return cluster


def slurm_arguments(spec: SlurmJobs, timeout_s: float) -> dict[str, Any]:
    """Keyword arguments of `dask_jobqueue.SLURMCluster`."""
    return {
        "queue": spec.queue,
        "account": spec.account,
        "walltime": spec.walltime,
        "cores": spec.workers_per_job,
        "processes": spec.workers_per_job,
        "memory": spec.memory,
        "interface": spec.interface,
        "job_extra_directives": list(spec.directives),
        "job_script_prologue": [*(f"export {name}={value}" for name, value in ONE_THREAD.items()), *spec.prologue],
        # A worker leaves in good order before SLURM kills it: what it holds goes to others.
        "worker_extra_args": ["--no-dashboard", "--lifetime", lifetime(spec.walltime), "--lifetime-stagger", "1m"],
        "python": spec.python,
        "local_directory": spec.scratch,
        "log_directory": spec.logs,
        "death_timeout": str(math.ceil(timeout_s)),
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
        "security": None if spec.tls is None else security_of(spec.tls, what="cluster.spec 'slurm' with tls"),
        "silence_logs": logging.CRITICAL,
    }


def lifetime(walltime: str) -> str:
    """Seconds that a worker may live, for Dask: two minutes less than SLURM's [days-]hours:minutes:seconds.

    RequestError: another form.
    """
    days, _, clock = walltime.rpartition("-")
    parts = clock.split(":")
    # minutes | minutes:seconds | hours:minutes:seconds, and after days: hours[:minutes[:seconds]]
    units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}.get(len(parts), ()) if not days else (3600, 60, 1)[: len(parts)]
    if not units or not all(part.isdigit() for part in (*parts, *([days] if days else []))):
        raise RequestError(f"walltime {walltime!r} does not have SLURM's form [days-]hours:minutes:seconds")
    seconds = int(days or 0) * 86_400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=True))
    return f"{max(seconds - 120, seconds // 2)}s"


def _kubernetes(spec: KubernetesPods, workers: int, timeout_s: float) -> Cluster:
    cluster: Cluster = _library(_KUBERNETES_CLUSTER, "kubernetes").KubeCluster(
        **kubernetes_arguments(spec, workers),
        namespace=spec.namespace,
        resource_timeout=math.ceil(timeout_s),
        quiet=True,
    )
    return cluster


def kubernetes_arguments(spec: KubernetesPods, workers: int) -> dict[str, Any]:
    """Keyword arguments that `KubeCluster` and `make_cluster_spec` of dask_kubernetes.operator share."""
    limits = {"cpu": spec.cpu, "memory": spec.memory}
    return {
        "name": f"{spec.name}-{uuid.uuid4().hex[:8]}",
        "image": spec.image,
        "n_workers": workers,
        "resources": {"requests": limits, "limits": limits},
        "env": ONE_THREAD | spec.environment,
        "worker_command": ["dask-worker", "--nthreads", "1", "--memory-limit", "0"],
    }


def _cuda(spec: CudaWorkers, workers: int, timeout_s: float) -> Cluster:
    cluster: Cluster = _library("dask_cuda", "cuda").LocalCUDACluster(**cuda_arguments(spec, workers))
    return cluster


def cuda_arguments(spec: CudaWorkers, workers: int) -> dict[str, Any]:
    """Keyword arguments of `dask_cuda.LocalCUDACluster`."""
    return {
        "CUDA_VISIBLE_DEVICES": list(spec.devices or range(workers)),
        "threads_per_worker": 1,
        "memory_limit": 0,
        "device_memory_limit": 0,  # the engine keeps to estimator.memory_mib by itself
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
    }


def _library(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise RequestError(
            f"cluster.spec {extra!r} needs {package}, which cannot be imported ({error}): "
            f"pip install 'deepzero[{extra}]'"
        ) from error


_STARTS: dict[type, Callable[[Any, int, float], Cluster]] = {
    LocalCluster: _local,
    SlurmJobs: _slurm,
    KubernetesPods: _kubernetes,
    CudaWorkers: _cuda,
}
