"""What is wrong with an installation, and how to mend it.

Only the standard library is imported at the top and whatever may be broken is tried in a process of its own: as
`python -m infra.doctor` this works where the rest does not.
"""

import concurrent.futures
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from infra.finding import Check, one_line, python

INSTALL = "pip install -c constraints.txt -e '.[test]'"
_MINIMUM_PYTHON = (3, 11)
_GIB = 2**30
_LOW_SPACE = 2 * _GIB
_PORTS = (
    ("Prefect", "prefect", "/api/health", b"true"),
    ("MLflow", "mlflow", "/health", b"OK"),
    ("Dask's pages", "dashboard", "/health", b"ok"),
)


def examine() -> list[Check]:
    """Every check, in a fixed order. A check that breaks down is itself a finding; nothing is raised."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        futures = [(name, pool.submit(check)) for name, check in _CHECKS]
        return [finding for name, future in futures for finding in _result(name, future)]


def _result(name: str, future: "concurrent.futures.Future[list[Check]]") -> list[Check]:
    error = future.exception()
    if error is None:
        return future.result()
    # Whatever breaks here is what the person came to find out about.
    return [Check(name, "fail", f"the check broke down: {type(error).__name__}: {one_line(str(error))}", INSTALL)]


def report(checks: Sequence[Check], *, as_json: bool = False) -> int:
    """Print the findings; the exit status: 1 when something fails, else 0."""
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.status:4}  {check.name:{width}}  {check.found}")
            if check.mend:
                print(f"{'':4}  {'':{width}}  -> {check.mend}")
        count = {status: sum(check.status == status for check in checks) for status in ("fail", "warn")}
        print(f"{len(checks)} checks, {count['fail']} failed, {count['warn']} with a warning")
    return 1 if any(check.status == "fail" for check in checks) else 0


# Software


def check_python() -> list[Check]:
    found = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] < _MINIMUM_PYTHON:
        wanted = ".".join(map(str, _MINIMUM_PYTHON))
        return [Check("python", "fail", found, f"install Python {wanted} or later and run: make install")]
    return [Check("python", "ok", found)]


def check_dependencies() -> list[Check]:
    """Versions of all that is needed, directly or not, against the requirements and the pins tested together."""
    from infra.requirements import examine_requirements

    outcome = examine_requirements()
    findings = [Check(f"package {name}", "fail", reason, INSTALL) for name, reason in outcome.broken.items()]
    if outcome.untested:
        shown = ", ".join(
            f"{name} {version} instead of {pin}" for name, (version, pin) in sorted(outcome.untested.items())
        )
        findings.append(Check("package versions", "warn", f"not the versions tested together: {shown}", INSTALL))
    if not findings:
        findings.append(Check("package versions", "ok", f"{outcome.examined} packages, all as required"))
    return findings


def check_prefect_server() -> list[Check]:
    """Prefect's server imports: later FastAPI versions satisfy its requirements and break it."""
    result = python("import prefect.server.api.server")
    if result.ok:
        return [Check("prefect server", "ok", "imports")]
    mend = INSTALL
    if "fastapi" in result.full.lower() or "min_items" in result.full:
        mend = f"pip install 'fastapi>=0.139,<0.151'   or all of it: {INSTALL}"
    return [Check("prefect server", "fail", f"cannot be imported: {result.text}", mend)]


def check_torch() -> list[Check]:
    """torch, its devices, and torchvision beside it."""
    result = python(
        "import json, torch\n"
        "cuda = torch.cuda.is_available()\n"
        "def described(i):\n"
        "    try: return f'{torch.cuda.get_device_name(i)} ({torch.cuda.utilization(i)}% busy)'\n"
        "    except ModuleNotFoundError: return torch.cuda.get_device_name(i)\n"
        "names = [described(i) for i in range(torch.cuda.device_count())] if cuda else []\n"
        "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda, 'devices': names}))"
    )
    if not result.ok:
        return [Check("torch", "fail", f"cannot be imported: {result.text}", INSTALL)]
    facts = json.loads(result.text)
    devices = ", ".join(facts["devices"])
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built for the CPU only"
    findings = [Check("torch", "ok", f"{facts['version']}, {built}")]
    if devices:
        findings.append(Check("cuda", "ok", devices))
    elif shutil.which("nvidia-smi") is not None:
        mend = "install a CUDA build of torch that suits the driver: https://pytorch.org/get-started/locally"
        findings.append(Check("cuda", "warn", "a driver is there, but torch sees no device", mend))
    else:
        findings.append(Check("cuda", "ok", "no device; the CPU is used"))
    return findings


def check_kernels() -> list[Check]:
    """Whether the engine's compiled kernels are in use, and what this machine can do at most."""
    result = python(
        "import json, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "from deepzero_core.perturb.machine import measured\n"
        "from deepzero_core.perturb.native.build import build\n"
        "from deepzero_core.perturb.native.gain import bfloat16_pays\n"
        "from deepzero_core.perturb.native.program import has_bfloat16\n"
        "built, machine = build(), measured()\n"
        "print(json.dumps({'used': built.library is not None, 'broken': built.broken, 'reason': built.reason,\n"
        "    'bfloat16': has_bfloat16(), 'pays': bfloat16_pays(), 'threads': machine.threads, 'flops': machine.flops,\n"
        "    'bandwidth': machine.bandwidth}))"
    )
    if not result.ok:
        return [Check("kernels", "fail", f"cannot be looked at: {result.text}", INSTALL)]
    facts = json.loads(result.full.splitlines()[-1])
    bfloat16 = "bfloat16 instructions" if facts["bfloat16"] else "no bfloat16 instructions"
    if facts["bfloat16"] and not facts["pays"]:
        bfloat16 += ", which are no faster and not used"
    found = f"{facts['reason']}, {bfloat16}" if facts["used"] else f"not in use, torch does it: {facts['reason']}"
    mend = "name a C++ compiler with OpenMP, such as g++, in CXX" if facts["broken"] else ""
    kernels = Check("kernels", "warn" if facts["broken"] else "ok", one_line(found), mend)
    peak = f"{facts['flops'] / 1e9:.0f} GFLOP/s and {facts['bandwidth'] / 1e9:.0f} GB/s, threads: {facts['threads']}"
    return [kernels, Check("peak", "ok", peak)]


def check_torchvision() -> list[Check]:
    """torchvision imports, beside a CPU-only torch as well; what helps it there is the data package's."""
    result = python(
        "from deepzero_core.data.torchvision_compat import import_torchvision\nprint(import_torchvision().__version__)"
    )
    if result.ok:
        return [Check("torchvision", "ok", result.text)]
    return [Check("torchvision", "fail", f"cannot be imported: {result.text}", INSTALL)]


def check_phiml() -> list[Check]:
    from importlib import metadata

    try:
        version = metadata.version("phiml")
    except metadata.PackageNotFoundError:
        return [Check("phiml", "ok", "not installed and not needed")]
    if version == "1.16.1":
        found = "1.16.1 breaks one-dimensional advection on torch"
        return [Check("phiml", "warn", found, "pip install phiml==1.16.0")]
    return [Check("phiml", "ok", version)]


# The machine


def check_home() -> list[Check]:
    from infra.home import VARIABLE, home

    path = home()
    existing = _nearest_existing(path)
    if path.is_dir():
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
            writable = True
        except OSError:
            writable = False
    else:
        writable = existing.is_dir() and os.access(existing, os.W_OK)
    if not writable:
        mend = f"make {existing} writable, or set {VARIABLE} to a folder of yours"
        return [Check("home", "fail", f"{path} cannot be written", mend), *_disk(existing, path)]
    return [Check("home", "ok", f"{path}{'' if path.is_dir() else ' (not there yet)'}"), *_disk(existing, path)]


def _disk(existing: Path, path: Path) -> list[Check]:
    free = shutil.disk_usage(existing).free
    found = f"{free / _GIB:.1f} GiB free"
    if free < _LOW_SPACE:
        return [Check("disk", "warn", found, f"checkpoints and data need room: at least 2 GiB below {path}")]
    return [Check("disk", "ok", found)]


def check_memory() -> list[Check]:
    import psutil

    available = psutil.virtual_memory().available
    found = f"{available / _GIB:.1f} GiB available"
    if available < _LOW_SPACE:
        mend = "lower cluster.workers, estimator.memory_mib and data.batch_size, or close other programs"
        return [Check("memory", "warn", found, mend)]
    return [Check("memory", "ok", found)]


def check_cores() -> list[Check]:
    # Fewer may be allowed than the machine has; only Linux says so.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if count == 1:
        return [Check("cores", "warn", "1", "use --set cluster.workers=0: worker processes gain nothing on one core")]
    return [Check("cores", "ok", str(count))]


def check_ports() -> list[Check]:
    """Those that the stack of this home takes, if they are free: it looks for others if not."""
    from infra.home import home
    from infra.stack import ports

    numbers = ports.remembered(home())
    return [_port(server, numbers[name], health, healthy) for server, name, health, healthy in _PORTS]


def _port(server: str, port: int, health: str, healthy: bytes) -> Check:
    name = f"port {port}"
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return Check(name, "ok", f"free for {server}")
    try:
        # No proxy stands between this machine and itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}{health}", timeout=3) as answer:
            if answer.read(100).strip() == healthy:
                return Check(name, "ok", f"{server} is running there")
    except (OSError, ValueError, urllib.error.URLError):
        found = f"in use by something that is not {server}"  # it does not speak HTTP, or says no
    else:
        found = f"in use by something that is not {server}"
    return Check(name, "warn", found, f"stop it, or leave it: `deepzero up` takes another port for {server}")


# Data


def check_data_root() -> list[Check]:
    given = os.environ.get("DEEPZERO_DATA_ROOT", "")
    if not given:
        return [Check("DEEPZERO_DATA_ROOT", "ok", "not set")]
    path = Path(given).expanduser()
    if not path.is_dir():
        return [Check("DEEPZERO_DATA_ROOT", "warn", f"{path} is not a folder", "create it, or unset the variable")]
    inside = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir())[:8])
    return [Check("DEEPZERO_DATA_ROOT", "ok", f"{path}: {inside or 'empty'}")]


def check_stores() -> list[Check]:
    """Every prepared data set against its checksums."""
    from infra.home import home, stores

    folder = stores(home())
    # Hidden folders are those being written.
    found = (
        sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if folder.is_dir()
        else []
    )
    if not found:
        return [Check("data stores", "ok", "none prepared yet")]
    from deepzero_core.data import verify
    from deepzero_core.errors import DeepZeroError

    findings = []
    for path in found:
        try:
            verify(path)
        except DeepZeroError as error:
            mend = f"deepzero data prepare {path.name.partition('-')[0]} --force"
            findings.append(Check(f"data {path.name}", "fail", one_line(str(error)), mend))
    return findings or [Check("data stores", "ok", f"{len(found)} intact: {', '.join(path.name for path in found)}")]


# The stack


def check_stack() -> list[Check]:
    from infra.stack import checks

    return checks.check_stack()


def check_mlflow() -> list[Check]:
    from infra.stack import checks

    return checks.check_mlflow_store(INSTALL)


def check_prefect_database() -> list[Check]:
    from infra.stack import checks

    return checks.check_prefect_database(INSTALL)


# Helpers


def _nearest_existing(path: Path) -> Path:
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


_CHECKS: tuple[tuple[str, Callable[[], list[Check]]], ...] = (
    ("python", check_python),
    ("package versions", check_dependencies),
    ("prefect server", check_prefect_server),
    ("torch", check_torch),
    ("torchvision", check_torchvision),
    ("kernels", check_kernels),
    ("phiml", check_phiml),
    ("mlflow store", check_mlflow),
    ("prefect database", check_prefect_database),
    ("home", check_home),
    ("memory", check_memory),
    ("cores", check_cores),
    ("ports", check_ports),
    ("stack", check_stack),
    ("DEEPZERO_DATA_ROOT", check_data_root),
    ("data stores", check_stores),
)


if __name__ == "__main__":
    sys.exit(report(examine()))
