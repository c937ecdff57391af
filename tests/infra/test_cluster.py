"""Connecting to Dask: local workers, a running scheduler, and nobody at the address."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import dask
import psutil
import pytest
import torch
from distributed import Client
from torch.nn import functional as F

from deepzero_core.data import prepare
from deepzero_core.errors import RequestError, WorkError
from deepzero_core.training import Batch, CGESource
from infra import cluster, plugins
from infra.cluster import connect, shares_disk
from infra.dask_settings import SETTINGS
from infra.fan_out import FanOut
from infra.forward import DistributedCGE
from infra.problem import Problem

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ended(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=15)[1]


def test_local_workers_come_and_go_with_the_block() -> None:
    before = set(psutil.Process().children(recursive=True))
    with connect(2, None, 60) as client:
        assert client.scheduler.address.startswith("tcp://127.0.0.1:"), "nobody else on the network reaches it"
        assert list(client.nthreads().values()) == [1, 1]
        started = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
        for process in started:  # as a signal to the whole process group does, which is for the run to answer
            process.terminate()
            process.send_signal(signal.SIGINT)
        assert {process.pid for process in started} == set(client.run(os.getpid).values())
    assert len(started) == 2 and ended(started)
    assert not {
        process.pid
        for process in set(psutil.Process().children(recursive=True)) - before
        if "resource_tracker" not in " ".join(process.cmdline())
    }


def test_local_workers_end_with_a_killed_parent() -> None:
    code = (
        "import os, time\n"
        "from infra.cluster import connect\n"
        "if __name__ == '__main__':\n"
        "    with connect(1, None, 60) as client:\n"
        "        print(*client.run(os.getpid).values(), flush=True)\n"
        "        time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert ended([worker])


@pytest.mark.parametrize("scheme", ["tcp://", ""])
def test_nobody_at_the_address_is_said_within_the_time_out(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    started = time.monotonic()
    with (
        pytest.raises(RequestError, match=rf"no Dask scheduler answers at cluster\.address='{address}' within 2 s"),
        connect(2, address, 2),
    ):
        pass
    assert time.monotonic() - started < 15


def test_something_else_at_the_address_is_no_scheduler() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(RequestError, match="no Dask scheduler answers"), connect(1, address, 2):
            pass


def test_a_web_server_at_the_address_is_no_scheduler() -> None:
    """The port of Dask's dashboard is easily taken for that of its scheduler."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.server_port}"
        with pytest.raises(RequestError, match="no Dask scheduler answers"), connect(1, address, 2):
            pass
        server.shutdown()


def python(*arguments: str, environment: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address of a scheduler with one worker, both processes of their own."""
    address = f"127.0.0.1:{free_port()}"
    port = address.partition(":")[2]
    scratch = str(tmp_path_factory.mktemp("dask"))
    scheduler = python("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    worker = python(
        "distributed.cli.dask_worker",
        f"tcp://{address}",
        "--nthreads",
        "1",
        "--no-dashboard",
        "--local-directory",
        scratch,
    )
    try:
        yield f"tcp://{address}", scheduler
    finally:
        for process in (worker, scheduler):
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    model = {"name": "cnn", "in_channels": 1, "num_classes": 10, "image_size": (8, 8), "depth": 1, "width": 3}
    return Problem(
        store=prepare("digits", home=tmp_path_factory.mktemp("digits")).path,
        batches={"batch_size": 8, "seed": 0, "augmentation": {"crop_padding": 0, "flip": False}, "limit": 32},
        model={**model, "arguments": {}, "seed": 0},
        mu=5e-3,
        difference="forward",
        memory=1 << 20,
    )


def test_a_worker_without_a_nanny_is_ended_by_the_signal(running: tuple[str, "subprocess.Popen[bytes]"]) -> None:
    """As those of the stack are, which get the same settings; only a nanny's worker leaves signals to others."""
    environment = {"DASK_INTERNAL_INHERIT_CONFIG": dask.config.serialize(SETTINGS)}
    worker = python("distributed.cli.dask_worker", running[0], "--no-nanny", "--no-dashboard", environment=environment)
    with connect(2, running[0], 60):
        worker.terminate()
        assert worker.wait(timeout=30) is not None


def test_a_running_scheduler_is_used_and_left_running(
    running: tuple[str, "subprocess.Popen[bytes]"], problem: Problem
) -> None:
    address, scheduler = running
    module = problem.build_module().train()
    batch = Batch.of(0, 0, 0, *problem.build_batches().batch(0, 0))
    expected = CGESource(F.cross_entropy, problem.mu, "forward", problem.memory).estimate(module, batch, None)
    for _ in range(2):  # a second run finds it as the first did
        with connect(1, address, 60) as client, DistributedCGE(client, problem) as source:
            estimate = source.estimate(module, batch, None)
        assert all(torch.equal(value, estimate.gradients[name]) for name, value in expected.gradients.items())
    assert scheduler.poll() is None


def test_what_a_killed_run_has_left_on_workers_is_taken_off_by_the_next(
    running: tuple[str, "subprocess.Popen[bytes]"],
) -> None:
    code = (
        "import os, signal, sys\n"
        "from infra.cluster import connect\n"
        "from infra.fan_out import FanOut\n"
        "with connect(1, sys.argv[1], 60) as client, FanOut(client, 'builtins:dict', {}):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with connect(1, running[0], 60) as first, FanOut(first, "builtins:dict", {}) as other:
        subprocess.run([sys.executable, "-c", code, running[0]], cwd=ROOT, check=False, timeout=120)
        assert len(ours(first)) == 2, "of a run that is alive, and of the killed one"
        with connect(1, running[0], 60) as client, FanOut(client, "builtins:dict", {}) as own:
            assert ours(client) == {other._name, own._name}


def test_the_scheduler_need_not_have_this_package_for_that(tmp_path: Path) -> None:
    path = tmp_path / "asked"
    path.write_bytes(cloudpickle.dumps(plugins._left_over()))
    code = (
        "import cloudpickle, pathlib, sys, types\n"
        "sys.modules['infra'] = None\n"
        "asked = cloudpickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "held = dict.fromkeys(['deepzero-forward-here-1', 'deepzero-forward-gone-2', 'another'])\n"
        "print(*asked(types.SimpleNamespace(worker_plugins=held, clients={'here': None})))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout == "deepzero-forward-gone-2\n"


def ours(client: Client) -> set[str]:
    """The names of plugins on the worker."""
    (names,) = client.run(
        lambda dask_worker: [name for name in dask_worker.plugins if name.startswith("deepzero-")]
    ).values()
    return set(names)


def test_workers_of_a_scheduler_on_loopback_are_asked_what_they_see(
    running: tuple[str, "subprocess.Popen[bytes]"], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(1, running[0], 60) as client:
        assert shares_disk(client)
        assert list(home.iterdir()) == []
        monkeypatch.setattr(client, "run", lambda call, path: {"a": call(path), "b": None})
        assert not shares_disk(client), "one of them does not see it"


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tls://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://10.0.0.1:1", False),
        ("tcp://localhost.elsewhere.org:1", False),
        ("tcp://1270.0.0.1:1", False),
        ("tcp://a127.b:1", False),
    ],
)
def test_loopback_is_told_from_other_addresses(address: str, here: bool) -> None:
    assert bool(cluster._LOOPBACK.match(address)) is here


def test_fewer_workers_than_asked_for_is_a_failure_of_the_work(running: tuple[str, "subprocess.Popen[bytes]"]) -> None:
    with pytest.raises(WorkError, match=r"1 of 3 Dask workers came within 1 s"), connect(3, running[0], 1):
        pass


@pytest.mark.parametrize("anew", [False, True], ids=["for good", "and is started anew"])
def test_a_scheduler_that_dies_is_a_failure_of_the_work(anew: bool, problem: Problem, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    port = address.partition(":")[2]
    started_as = "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"
    scheduler = python(*started_as)
    worker = python(
        "distributed.cli.dask_worker", f"tcp://{address}", "--no-dashboard", "--local-directory", str(tmp_path)
    )
    module, batches = problem.build_module().train(), problem.build_batches()
    try:
        with connect(1, f"tcp://{address}", 60) as client, DistributedCGE(client, problem, timeout_s=25) as source:
            source.estimate(module, Batch.of(0, 0, 0, *batches.batch(0, 0)), None)
            scheduler.kill()
            scheduler.wait()
            if anew:
                scheduler = python(*started_as)
            started = time.monotonic()
            with pytest.raises(WorkError, match=rf"scheduler at tcp://{address} was lost in the middle of a step"):
                while True:  # the worker may still answer before it hears of it
                    source.estimate(module, Batch.of(1, 0, 1, *batches.batch(0, 1)), None)
                    assert time.monotonic() - started < 60
            assert time.monotonic() - started < 60
    finally:
        for process in (worker, scheduler):
            process.kill()
            process.wait()
