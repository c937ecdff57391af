"""From `cluster` in a configuration to one checked description of where workers come from.

Order: `cluster.address`; else the file named by `cluster.spec` with `cluster.options` in place of its keys; else, where
workers are asked for, the scheduler at $DEEPZERO_DASK_ADDRESS; else processes of this machine.
"""

import importlib.resources
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs import yaml_text
from configs.clusters import FILES, KINDS, ClusterSpec, CudaWorkers, LocalCluster, RunningScheduler
from configs.messages import kind_of, reasons, shown
from configs.schema import ClusterConfig
from deepzero_core.errors import RequestError, suggest

ADDRESS = "DEEPZERO_DASK_ADDRESS"


def cluster_spec(settings: ClusterConfig) -> ClusterSpec:
    """Where the workers of these settings come from.

    Raises:
        RequestError: no such file, one that cannot be read, a key or value that its kind does not take, no address.
    """
    if settings.spec is None:
        address = settings.address or (os.environ.get(ADDRESS) or None if settings.workers else None)
        return LocalCluster() if address is None else RunningScheduler(address=address)
    spec = _read(settings.spec, settings.options)
    if not isinstance(spec, RunningScheduler):
        return spec
    address = settings.address or spec.address
    if address is None:
        raise RequestError(f"cluster.spec {settings.spec!r} names no scheduler: set cluster.address=tcp://HOST:8786")
    return RunningScheduler(address=address, tls=spec.tls)


def described(settings: ClusterConfig) -> str:
    """Where the workers come from, in a few words."""
    spec = cluster_spec(settings)
    if isinstance(spec, RunningScheduler):
        return str(spec.address)
    return str(settings.workers) if settings.spec is None else f"{settings.workers} ({spec.kind})"


def device_of(settings: ClusterConfig) -> str:
    """What the workers' torch computes on."""
    return "cuda" if isinstance(cluster_spec(settings), CudaWorkers) else "cpu"


def elsewhere(settings: ClusterConfig) -> bool:
    """Whether the workers may be on other machines."""
    return not isinstance(cluster_spec(settings), LocalCluster | CudaWorkers)


def _read(name: str, options: dict[str, Any]) -> ClusterSpec:
    if name in FILES:
        text = (importlib.resources.files("infra") / "clusters" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        text = _text(Path(name).expanduser())
    try:
        data = yaml_text.parse(text)
    except yaml_text.YamlError as error:
        raise RequestError(f"cluster file {name}: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(f"cluster file {name}: a mapping of keys to values is needed, not {kind_of(data)}")
    kind = data.get("kind")
    if kind not in KINDS:
        raise RequestError(f"cluster file {name}: kind cannot be {shown(kind)}; {suggest(str(kind), KINDS)}")
    try:
        spec: Any = KINDS[kind].model_validate(data | options)
    except ValidationError as error:
        raise RequestError(
            "\n".join(f"cluster file {name}: {reason}" for reason in reasons(KINDS[kind], error))
        ) from None
    return spec  # type: ignore[no-any-return]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cluster file {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RequestError(f"cluster file {path} is not UTF-8 text") from None
