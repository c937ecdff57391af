"""The schemas of cluster files: how workers are come by, one model for each kind.

`cluster.spec` names such a file, `cluster.options` overrides keys of it. Kinds are a fixed list: no file names a class.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from configs.schema import Count, Section, Text

_ONE_LINE = r"^[^\r\n\x00]+$"
Line = Annotated[str, StringConstraints(strict=True, pattern=_ONE_LINE)]
Size = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9]+(\.[0-9]+)? ?([kMGT]i?B|B)$")]
Quantity = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$")]
DnsLabel = Annotated[str, StringConstraints(strict=True, pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
EnvironmentName = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class TlsFiles(Section):
    """PEM files; what is not named here is named by DEEPZERO_TLS_CA, DEEPZERO_TLS_CERT and DEEPZERO_TLS_KEY."""

    ca: Path | None = None
    """Certificate of the authority that scheduler and workers are signed by."""
    cert: Path | None = None
    """This side's own certificate."""
    key: Path | None = None
    """Its private key."""


class LocalCluster(Section):
    """Processes of this machine, on loopback."""

    kind: Literal["local"] = "local"
    memory: Size | None = None
    """Memory at which a worker is restarted; none: no limit."""


class RunningScheduler(Section):
    """A Dask scheduler that runs already, with whatever workers it has."""

    kind: Literal["scheduler"] = "scheduler"
    address: Text | None = None
    """tcp://host:8786, or tls://host:8786; `cluster.address` goes before it."""
    tls: TlsFiles = TlsFiles()


class SlurmJobs(Section):
    """Jobs of SLURM, by dask-jobqueue; the scheduler runs in this process."""

    kind: Literal["slurm"] = "slurm"
    queue: Line | None = None
    """Partition (sbatch -p)."""
    account: Line | None = None
    """Account (sbatch -A)."""
    walltime: Line = "04:00:00"
    """Limit of a job (sbatch -t); workers end a minute before it, and others take over."""
    workers_per_job: Count = 1
    """Worker processes, and cores, of one job."""
    memory: Size = "4 GiB"
    """Memory of one job."""
    interface: Line | None = None
    """Network interface through which scheduler and workers see each other, such as ib0."""
    directives: tuple[Line, ...] = ()
    """Further lines after #SBATCH."""
    prologue: tuple[Line, ...] = ()
    """Shell lines before the worker starts, such as `module load python`."""
    python: Line | None = None
    """The interpreter on the nodes; none: this one."""
    scratch: Line | None = None
    """Folder on the nodes for the worker's files, best on a local disk."""
    logs: Line | None = None
    """Folder for the jobs' output."""
    tls: TlsFiles | None = None
    """Encrypt with these files; none: plain TCP inside the cluster's network."""


class KubernetesPods(Section):
    """Pods of a DaskCluster resource, by dask-kubernetes; its operator has to be installed in the cluster."""

    kind: Literal["kubernetes"] = "kubernetes"
    image: Line = "deepzero:0.1.0"
    """Container image with deepzero; see infra/docker."""
    name: DnsLabel = "deepzero"
    """Name of the DaskCluster resource; a number is added, so that two runs have one each."""
    namespace: DnsLabel | None = None
    """None: that of the current context."""
    cpu: Quantity = "1"
    """Cores of a worker, requested and allowed."""
    memory: Quantity = "2Gi"
    """Memory of a worker, requested and allowed."""
    environment: dict[EnvironmentName, Line] = Field(default_factory=dict)
    """Variables of the containers. Secrets do not belong here: mount them into the image's namespace."""


class CudaWorkers(Section):
    """One process for each GPU of this machine, by dask-cuda."""

    kind: Literal["cuda"] = "cuda"
    devices: tuple[Annotated[int, Field(strict=True, ge=0)], ...] = ()
    """Numbers of the GPUs; none: the first `cluster.workers` of them."""


ClusterSpec = LocalCluster | RunningScheduler | SlurmJobs | KubernetesPods | CudaWorkers
KINDS: dict[str, type[Section]] = {
    "local": LocalCluster,
    "scheduler": RunningScheduler,
    "slurm": SlurmJobs,
    "kubernetes": KubernetesPods,
    "cuda": CudaWorkers,
}

FILES = {
    "local": "local",
    "scheduler": "scheduler",
    "scheduler-tls": "scheduler",
    "slurm": "slurm",
    "kubernetes": "kubernetes",
    "cuda": "cuda",
}
"""By name of a file in infra/clusters: its kind."""
