"""Clusters that come and go with a run: the library of each kind, told what the cluster file says.

Every worker is one process that computes on one thread.
"""

import logging
import math
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

from distributed import LocalCluster as DaskLocalCluster
from distributed import Status
from distributed.deploy.cluster import Cluster

from configs.clusters import ClusterSpec, CudaWorkers, KubernetesPods, LocalCluster, SlurmJobs
from deepzero_core.errors import RequestError, WorkError
from infra.transport_security import security_of

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_WALLTIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
_KUBERNETES_CLUSTER = "dask_kubernetes.operator"


@contextmanager
def launched(
    spec: LocalCluster | SlurmJobs | KubernetesPods | CudaWorkers, workers: int, timeout_s: float
) -> Iterator[Cluster]:
    """A cluster that has been asked for `workers` workers, until the block ends.

    Raises:
        RequestError: the library is not installed, or SLURM refuses such jobs.
        WorkError: the library could not start it; its reason is given.
    """
    cluster = _launch(spec, workers, timeout_s)
    try:
        yield cluster
    finally:
        try:
            cluster.close()
        except AssertionError:
            # Dask's last check of its own closing, which a job fails that could not be submitted.
            cluster.status = Status.closed


def _launch(spec: ClusterSpec, workers: int, timeout_s: float) -> Cluster:
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
    cluster: Any = _library("dask_jobqueue", "slurm").SLURMCluster(**slurm_arguments(spec, timeout_s))
    try:
        _try(cluster.job_script())
    except BaseException:
        cluster.close()
        raise
    cluster.scale(n=workers)
    return cast(Cluster, cluster)


def _try(script: str) -> None:
    """Ask SLURM whether it takes such a job. RequestError: it does not, or there is no SLURM."""
    if shutil.which("sbatch") is None:
        raise RequestError("cluster.spec 'slurm' needs SLURM's command sbatch, which is not on PATH")
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        command = ["sbatch", "--test-only", file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        reason = " ".join((done.stderr or done.stdout).split())
        raise RequestError(f"SLURM refuses the job of cluster.spec 'slurm': {reason}")


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
    match = _WALLTIME.fullmatch(walltime)
    if match is None:
        raise RequestError(f"walltime {walltime!r} does not have SLURM's form [days-]hours:minutes:seconds")
    parts = match["clock"].split(":")
    # minutes | minutes:seconds | hours:minutes:seconds, and after days: hours[:minutes[:seconds]]
    units = (3600, 60, 1)[: len(parts)] if match["days"] else (60, 1) if len(parts) < 3 else (3600, 60, 1)
    seconds = int(match["days"] or 0) * 86_400 + sum(int(p) * unit for p, unit in zip(parts, units, strict=False))
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
