"""Two hosts, as network namespaces of this one: TLS between them, no disk in common, the same bits.

first     the run and the scheduler, with the data store and a package of the user's own
second    the worker: another DEEPZERO_HOME, another working directory, the installed package alone, and an empty file
          system where the first host's files lie
"""

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from deepzero_core.data import prepare

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deepzero_core", "configs", "infra", "simulators", "tasks", "flows")
FIRST, SECOND = "10.213.77.1", "10.213.77.2"
NETS = """
from torch import nn
from ownlayers import Scale

def small(features):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, features), Scale(features), nn.ReLU(), nn.Linear(features, 10))
"""
LAYERS = """
import torch
from torch import nn

class Scale(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, features))

    def forward(self, x):
        return x * self.factor
"""
STRANGER = """
from configs.schema import ClusterConfig
from infra.cluster import open_cluster
with open_cluster(ClusterConfig(workers=1, address={address!r}, timeout_s=3)):
    pass
"""


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=30)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a cable."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("two hosts are network namespaces: that needs Linux, root, and the commands ip and unshare")
    names = [f"dz{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            f"{names[0]}v",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            f"{names[1]}v",
            "netns",
            names[1],
        )
        for name, address in zip(names, (FIRST, SECOND), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"{name}v")
            ip("-n", name, "link", "set", f"{name}v", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            ip("netns", "delete", name, check=False)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    try:
        yield names[0], names[1]
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, dict[str, str]]:
    """By host, what names its PEM files: one authority, a certificate each, and one of a stranger."""
    ca, stranger = trustme.CA(), trustme.CA()
    found = {}
    for host, authority in (("first", ca), ("second", ca), ("stranger", stranger)):
        folder = tmp_path / f"tls-{host}"
        folder.mkdir()
        pair = authority.issue_cert(str(ipaddress.ip_address(FIRST)), str(ipaddress.ip_address(SECOND)))
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        pair.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
        pair.private_key_pem.write_to_path(str(folder / "key.pem"))
        found[host] = {f"DEEPZERO_TLS_{name.upper()}": str(folder / f"{name}.pem") for name in ("ca", "cert", "key")}
    return found


def options(files: dict[str, str]) -> list[str]:
    ca, cert, key = files.values()
    return ["--tls-ca-file", ca, "--tls-cert", cert, "--tls-key", key]


def test_workers_of_another_host_give_the_same_bits(
    namespaces: tuple[str, str], certificates: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    here, there = tmp_path / "first", tmp_path / "second"
    code, site, elsewhere = here / "code", there / "site", there / "elsewhere"
    for folder in (code / "ownnet", here / "tmp", site, elsewhere, there / "scratch"):
        folder.mkdir(parents=True)
    (code / "ownnet" / "__init__.py").touch()
    (code / "ownnet" / "nets.py").write_text(NETS)
    (code / "ownlayers.py").write_text(LAYERS)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    store = prepare("digits", home=here / "home").path

    plain = {name: value for name, value in os.environ.items() if not name.startswith("DEEPZERO_")}
    first = plain | certificates["first"] | {"DEEPZERO_HOME": str(here / "home"), "PYTHONPATH": f"{ROOT}:{code}"}
    first["TMPDIR"] = str(here / "tmp")
    second = plain | certificates["second"] | {"DEEPZERO_HOME": str(there / "home"), "PYTHONPATH": str(site)}
    address = f"tls://{FIRST}:8786"
    scheduler = ["-m", "distributed.cli.dask_scheduler", "--host", FIRST, "--port", "8786", "--protocol", "tls"]
    arguments = ["-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--protocol", "tls", "--no-dashboard"]
    arguments += ["--host", SECOND, "--local-directory", str(there / "scratch"), *options(certificates["second"])]
    # Nothing of the first host is to be seen by the second.
    hide = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(here)]
    processes: list[subprocess.Popen[bytes]] = []

    def start(namespace: str, command: list[str], environment: dict[str, str], folder: Path) -> int:
        """The number of the process, whose output goes to a file."""
        number = len(processes)
        command = ["ip", "netns", "exec", namespace, *command]
        with (tmp_path / f"log{number}").open("w") as log, (tmp_path / f"output{number}").open("w") as output:
            processes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=log))
        return number

    def log(number: int) -> str:
        return (tmp_path / f"log{number}").read_text()

    try:
        scheduler += ["--no-dashboard", *options(certificates["first"])]
        start(namespaces[0], [sys.executable, *scheduler], first, here)
        worker = start(namespaces[1], [*hide, sys.executable, *arguments], second, elsewhere)
        scratch = here / "run"
        scratch.mkdir()
        script = [sys.executable, str(Path(__file__).with_name("two_hosts.py")), address, str(store), str(scratch)]
        run = start(namespaces[0], script, first, here)
        # Somebody whose certificate is of another authority gets no word out of the scheduler.
        script = [sys.executable, "-c", STRANGER.format(address=address)]
        stranger = start(namespaces[0], script, first | certificates["stranger"], here)
        assert processes[run].wait(timeout=120) == 0, log(run) + log(worker)
        assert processes[stranger].wait(timeout=60) != 0
        assert "no Dask scheduler answers" in log(stranger)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=30)
    output = (tmp_path / f"output{run}").read_text()
    found = json.loads(output)
    assert found["same"] and all(found["same"]) and found["tables"]
    assert len(found["workers"]) == 1 and found["workers"][0].startswith(f"tls://{SECOND}:")
    assert (found["home"], found["folder"], found["sees"]) == (str(there / "home"), str(elsewhere), [])
    assert found["package"] == str(site)
    assert found["lanes"] == "closed", "they have a network between them, and get tasks"
    # The environment may lie in the checkout; but nothing is imported from the checkout itself or the first host.
    assert [entry for entry in found["path"] if entry == str(ROOT) or entry.startswith(str(here))] == []
