"""Where workers come from: cluster files, mistakes in them, and what the libraries make of them."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from inspect import signature
from pathlib import Path

import psutil
import pytest

from configs import load
from configs.clusters import FILES, CudaWorkers, KubernetesPods, LocalCluster, RunningScheduler, SlurmJobs
from configs.schema import ClusterConfig
from deepzero_core.errors import RequestError, WorkError
from infra import launch
from infra.cluster import open_cluster
from infra.specs import ADDRESS, cluster_spec

ROOT = Path(__file__).resolve().parents[2]
TLS = ("DEEPZERO_TLS_CA", "DEEPZERO_TLS_CERT", "DEEPZERO_TLS_KEY")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ADDRESS, *TLS):
        monkeypatch.delenv(name, raising=False)


def test_the_files_are_those_that_configurations_may_name() -> None:
    folder = files("infra") / "clusters"
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.yaml" for name in FILES)
    for name, kind in FILES.items():
        assert cluster_spec(ClusterConfig(spec=name)).kind == kind


def test_options_go_before_the_file_and_the_address_before_both() -> None:
    spec = cluster_spec(ClusterConfig(spec="slurm", options={"queue": "long", "workers_per_job": 4}))
    assert isinstance(spec, SlurmJobs) and (spec.queue, spec.workers_per_job, spec.memory) == ("long", 4, "4 GiB")
    tls = cluster_spec(ClusterConfig(spec="scheduler-tls", options={"address": "tls://b:1", "tls": {"ca": "a.pem"}}))
    assert isinstance(tls, RunningScheduler) and (tls.address, tls.tls.ca) == ("tls://b:1", Path("a.pem"))
    given = cluster_spec(ClusterConfig(spec="scheduler", address="tcp://c:2"))
    assert isinstance(given, RunningScheduler) and given.address == "tcp://c:2"


def test_the_scheduler_of_the_environment_is_taken_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS, "tcp://somewhere:8786")
    assert cluster_spec(ClusterConfig(workers=2)) == RunningScheduler(address="tcp://somewhere:8786")
    assert cluster_spec(ClusterConfig(address="tcp://c:2")) == RunningScheduler(address="tcp://c:2")
    for here in (ClusterConfig(workers=0), ClusterConfig(spec="local")):
        assert cluster_spec(here) == LocalCluster()
    monkeypatch.setenv(ADDRESS, "")
    assert cluster_spec(ClusterConfig(workers=2)) == LocalCluster()
    monkeypatch.setenv(ADDRESS, "tcp://127.0.0.1:9")
    with (
        pytest.raises(RequestError, match=rf"no Dask scheduler answers at {ADDRESS}='tcp://127\.0\.0\.1:9'"),
        open_cluster(ClusterConfig(timeout_s=1)),
    ):
        pass


MISTAKES = {
    "name": (["cluster.spec=slrm"], "cluster.spec: there is no cluster 'slrm'; did you mean 'slurm'? (a file of your"),
    "key": (["cluster.options={queu: a}"], "cluster.options: queu is not a known key; did you mean 'queue'?"),
    "value": (["cluster.options={workers_per_job: 0}"], "workers_per_job must be greater than or equal to 1, but is 0"),
    "newline": (['cluster.options={queue: "a\\nb"}'], "cluster.options: queue must"),
    "kind": (["cluster.options={kind: cuda}"], "kind is what the file says, 'slurm'"),
    "address": (["cluster.address=tcp://a:1"], "cluster.spec 'slurm' starts a scheduler of its own"),
    "workers": (["cluster.workers=0"], "0 evaluates in this process, but cluster.spec names a cluster"),
    "alone": (["cluster.spec=null", "cluster.options={queue: a}"], "they are keys of a cluster file"),
}


@pytest.mark.parametrize("overrides, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_before_anything_runs(overrides: list[str], message: str) -> None:
    with pytest.raises(RequestError) as refusal:
        load("smoke", ["cluster.workers=1", "cluster.spec=slurm", *overrides])
    assert message in str(refusal.value)


OWN = {
    "slurm": ("kind: slurm\nqueue: big\n", None),
    "kind": ("kind: slrm\n", "kind cannot be 'slrm'; did you mean 'slurm'?"),
    "class": ("kind: dask_jobqueue.PBSCluster\n", "kind cannot be 'dask_jobqueue.PBSCluster'"),
    "key": ("kind: kubernetes\nimge: a\n", "imge is not a known key; did you mean 'image'?"),
    "no address": ("kind: scheduler\n", "names no scheduler: set cluster.address"),
    "list": ("[1]\n", "a mapping of keys to values is needed"),
    "empty": ("", "a mapping of keys to values is needed"),
    "tag": ("kind: !!python/name:os.system slurm\n", "the tag"),
    "bytes": (b"\xff\xfe\x00", "is not UTF-8 text"),
}


@pytest.mark.parametrize("text, message", OWN.values(), ids=OWN)
def test_a_file_of_ones_own(tmp_path: Path, text: str | bytes, message: str | None) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    settings = load("smoke", ["cluster.workers=1", f"cluster.spec={path}"]).cluster
    if message is None:
        assert cluster_spec(settings) == SlurmJobs(queue="big")
        return
    with pytest.raises(RequestError) as refusal:
        cluster_spec(settings)
    assert message in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cluster file .*none\.yaml cannot be read: No such file"):
        cluster_spec(ClusterConfig(spec=str(tmp_path / "none.yaml")))


def test_tls_without_its_files_says_which_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal() -> str:
        settings = ClusterConfig(spec="scheduler-tls", timeout_s=1)
        with pytest.raises(RequestError) as error, open_cluster(settings):
            pass
        return str(error.value)

    assert "needs the authority's certificate: set tls.ca in cluster.options, or DEEPZERO_TLS_CA" in refusal()
    monkeypatch.setenv("DEEPZERO_TLS_CA", str(tmp_path / "none.pem"))
    assert "the authority's certificate" in refusal() and "cannot be read" in refusal()
    secret = "not for anybody's eyes"
    for name in TLS:
        (tmp_path / name).write_text(secret)
        monkeypatch.setenv(name, str(tmp_path / name))
    assert "the TLS files cannot be used together" in refusal() and secret not in refusal()


@pytest.mark.parametrize("extra, module", [("slurm", "dask_jobqueue"), ("kubernetes", "dask_kubernetes.operator")])
def test_without_its_library_a_kind_names_the_command(extra: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(RequestError, match=rf"cluster\.spec '{extra}' needs .* pip install 'deepzero\[{extra}\]'"),
        open_cluster(ClusterConfig(workers=1, spec=extra)),
    ):
        pass


@pytest.mark.parametrize(
    "walltime, expected",
    [("04:00:00", 14_280), ("1-00:00:00", 86_280), ("2-12", 215_880), ("30", 1_680), ("02:00", 60)],
)
def test_workers_of_a_job_leave_before_it_is_killed(walltime: str, expected: int) -> None:
    assert launch.lifetime(walltime) == f"{expected}s"


@pytest.mark.parametrize("walltime", ["four hours", "1:2:3:4", "", "-1", "1-2:3:4:5"])
def test_a_walltime_of_another_form_is_refused(walltime: str) -> None:
    with pytest.raises(RequestError, match="does not have SLURM's form"):
        launch.lifetime(walltime)


def test_the_job_that_dask_jobqueue_makes() -> None:
    jobqueue = pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed: pip install '.[slurm]'")
    spec = SlurmJobs(
        queue="long", account="lab", walltime="1-00:00:00", workers_per_job=4, memory="16 GiB",
        directives=("--exclusive",), prologue=("module load python",), python="python3", scratch="/scratch",
    )  # fmt: skip
    with jobqueue.SLURMCluster(**launch.slurm_arguments(spec, 60)) as cluster:
        script = cluster.job_script()
        assert cluster.scheduler_address.startswith("tcp://")
    lines = script.splitlines()
    for line in (
        "#SBATCH -p long", "#SBATCH -A lab", "#SBATCH -t 1-00:00:00", "#SBATCH --cpus-per-task=4", "#SBATCH --mem=16G",
        "#SBATCH --exclusive", "module load python", "export OMP_NUM_THREADS=1",
    ):  # fmt: skip
        assert line in lines
    command = next(line for line in lines if "dask_worker" in line or "dask worker" in line)
    for part in ("python3 -m", "--nthreads 1", "--nworkers 4", "--lifetime 86280s", "--local-directory /scratch"):
        assert part in command


SBATCH = """#!/bin/sh
# A SLURM of one node: the script that it is given, which it keeps as the real one does, runs at once.
[ "$1" = --test-only ] && exit 0
cp "$1" "$JOBS.$$"
setsid sh "$JOBS.$$" >/dev/null 2>&1 &
echo $! >> "$JOBS"
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
for job in "$@"; do kill -- "-$job" 2>/dev/null; done
exit 0
"""
REFUSING = """#!/bin/sh
echo "sbatch: error: invalid partition specified: lnog" >&2
exit 1
"""
FULL = """#!/bin/sh
[ "$1" = --test-only ] && exit 0
exit 1
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts programs where SLURM's would be."""
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed: pip install '.[slurm]'")

    def install(**programs: str) -> None:
        for name, text in programs.items():
            program = tmp_path / name
            program.write_text(text)
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        # Where there is a real SLURM, it stays out of sight.
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}" if programs else str(tmp_path))
        monkeypatch.setenv("JOBS", str(tmp_path / "jobs"))

    return install


def test_jobs_are_submitted_used_and_cancelled(slurm: Callable[..., None], tmp_path: Path) -> None:
    """From the configuration to workers that answer, with an sbatch that runs what it is given."""
    slurm(sbatch=SBATCH, scancel=SCANCEL)
    jobs, options = tmp_path / "jobs", {"interface": "lo", "scratch": str(tmp_path / "scratch")}
    try:
        with open_cluster(ClusterConfig(workers=2, spec="slurm", options=options, timeout_s=60)) as client:
            assert list(client.nthreads().values()) == [1, 1]
            assert set(client.run(lambda: __import__("os").environ["OMP_NUM_THREADS"]).values()) == {"1"}
            processes = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
        assert len(jobs.read_text().split()) == 2
        assert not psutil.wait_procs(processes, timeout=20)[1]
    finally:
        for job in jobs.read_text().split() if jobs.exists() else ():
            with suppress(ProcessLookupError):
                os.killpg(int(job), signal.SIGKILL)


@pytest.mark.parametrize(
    "program, error, message",
    [
        (None, RequestError, "needs SLURM's command sbatch, which is not on PATH"),
        (REFUSING, RequestError, "SLURM refuses the job of cluster.spec 'slurm': sbatch: error: invalid partition"),
        (FULL, WorkError, "0 of 1 Dask workers came within 1 s"),
    ],
    ids=["absent", "refusing", "full"],
)
def test_a_slurm_that_takes_no_jobs(
    slurm: Callable[..., None], program: str | None, error: type[Exception], message: str
) -> None:
    slurm(**({} if program is None else {"sbatch": program, "scancel": SCANCEL}))
    with (
        pytest.raises(error, match=re.escape(message)),
        open_cluster(ClusterConfig(workers=1, spec="slurm", options={"interface": "lo"}, timeout_s=1)),
    ):
        pass


def test_the_pods_that_dask_kubernetes_makes() -> None:
    """In a process of its own: the library warns while it is imported."""
    pytest.importorskip("kr8s", reason="dask-kubernetes is not installed: pip install '.[kubernetes]'")
    code = (
        "import json, inspect\n"
        "from dask_kubernetes.operator import KubeCluster, make_cluster_spec\n"
        "from configs.clusters import KubernetesPods\n"
        "from dask_kubernetes.operator.validation import validate_cluster_name\n"
        "from infra.launch import kubernetes_arguments\n"
        "found = kubernetes_arguments(KubernetesPods(image='r/deepzero:0.1.0', environment={'A': 'b'}), 7)\n"
        "inspect.signature(KubeCluster.__init__).bind(None, **found, namespace=None, resource_timeout=60, quiet=True)\n"
        "validate_cluster_name(found['name'])\n"
        "print(json.dumps(make_cluster_spec(**found)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    spec = json.loads(done.stdout)
    assert (spec["kind"], spec["spec"]["worker"]["replicas"]) == ("DaskCluster", 7)
    for part in ("worker", "scheduler"):
        (container,) = spec["spec"][part]["spec"]["containers"]
        assert container["image"] == "r/deepzero:0.1.0"
        assert container["resources"]["limits"] == {"cpu": "1", "memory": "2Gi"}
        assert {"name": "A", "value": "b"} in container["env"]
    args = spec["spec"]["worker"]["spec"]["containers"][0]["args"]
    assert args[:5] == ["dask-worker", "--nthreads", "1", "--memory-limit", "0"]


def test_what_is_asked_of_dask_cuda() -> None:
    asked = launch.cuda_arguments(CudaWorkers(), 3)
    assert asked["CUDA_VISIBLE_DEVICES"] == [0, 1, 2]
    assert launch.cuda_arguments(CudaWorkers(devices=(0, 2)), 2)["CUDA_VISIBLE_DEVICES"] == [0, 2]
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        pytest.skip(f"dask-cuda cannot be imported on this machine ({error})")
    assert "threads_per_worker" in signature(LocalCUDACluster.__init__).parameters
    signature(LocalCUDACluster.__init__).bind(None, **asked)


def test_pods_have_names_and_sizes_that_kubernetes_takes() -> None:
    with pytest.raises(ValueError, match="cpu"):
        KubernetesPods(cpu="two")
    with pytest.raises(ValueError, match="name"):
        KubernetesPods(name="Not_a_label")
