"""Much at once: 100,000 metrics in one run, and fifty flow runs in a queue.

metrics  written through `tasks.tracking.Run` as a training writes them, ten a step; then read back: all there, in order
queue    submitted at once to a Prefect server whose work pool runs a few at a time; each is a real run of `classify`
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.processes import ROOT, environment, prefect_server
from deepzero_core.errors import WorkError

METRICS, PER_STEP = 100_000, 10


@dataclass(frozen=True)
class Load:
    """One row. lost: what was not as it should be, in words."""

    what: str
    count: int
    seconds: float
    lost: str


def metrics(count: int = METRICS) -> Load:
    """Write and read back; the store lies below the home that the caller has set up."""
    from tasks.tracking import Run, initialise

    experiment, steps = initialise("load"), count // PER_STEP
    started = time.perf_counter()
    with Run.start(experiment, "metrics") as run:
        for step in range(1, steps + 1):
            run.metrics({f"group/metric{number}": step + number / 10 for number in range(PER_STEP)}, step)
    seconds = time.perf_counter() - started
    lost = []
    client = run._outbox.client
    for number in range(PER_STEP):
        found = [(p.step, p.value) for p in client.get_metric_history(run.run_id, f"group/metric{number}")]
        if found != [(step, step + number / 10) for step in range(1, steps + 1)]:
            lost.append(f"metric{number} is not complete and in order")
    return Load(f"{count:,} metrics in one run", count, seconds, "; ".join(lost))


CONFIG = """
data: {name: digits, batch_size: 16, train_limit: 32, test_limit: 16}
model: {name: cnn, depth: 1, width: 4}
pruning: {method: random, sparsity: 0.5}
training: {epochs: 1, steps: 2, schedule: {warmup_epochs: 0}}
cluster: {workers: 0}
"""

# A served deployment takes runs from the server as a worker does, and this many at a time.
_SERVE = """
import sys, yaml
from infra import orchestration
orchestration.configure()
from flows.classify import classify
parameters = {"experiment": yaml.safe_load(sys.argv[2])}
classify.serve(name="load", limit=int(sys.argv[1]), parameters=parameters, print_starting_message=False)
"""


def queue(count: int, limit: int, report: Callable[[str], None]) -> Load:
    """Submit `count` runs at once, `limit` of which run at a time."""
    with tempfile.TemporaryDirectory(prefix="deepzero-load-", ignore_cleanup_errors=True) as folder:
        server, address = prefect_server(Path(folder))
        server.start()
        home = {"DEEPZERO_HOME": f"{folder}/home", "PREFECT_HOME": f"{folder}/prefect", "PREFECT_API_URL": address}
        command = [sys.executable, "-c", _SERVE, str(limit), CONFIG]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(**home), start_new_session=True)
        try:
            return _queued(count, limit, address, Path(folder) / "home", report)
        finally:
            for one in [*_family(process.pid)]:
                with suppress(psutil.Error):
                    one.kill()
            process.wait(30)
            server.kill()


def _queued(count: int, limit: int, address: str, home: Path, report: Callable[[str], None]) -> Load:
    os.environ["PREFECT_API_URL"] = address
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        deployment, deadline = None, time.monotonic() + 180
        while deployment is None:
            try:
                deployment = client.read_deployment_by_name("classify/load")
            except ObjectNotFound:
                if time.monotonic() > deadline:
                    raise WorkError("the deployment did not appear within 180 s") from None
                time.sleep(0.5)
        started = time.perf_counter()
        runs = [
            client.create_flow_run_from_deployment(
                deployment.id, parameters={"experiment": {"name": "load", "seed": seed, **_sections()}}
            ).id
            for seed in range(count)
        ]
        report(f"{count} runs submitted in {time.perf_counter() - started:.1f} s")
        most, said = 0, 0.0
        while True:
            these = FlowRunFilter.model_validate({"id": {"any_": runs}})
            found = client.read_flow_runs(flow_run_filter=these, limit=200)
            states = [str(run.state_name) for run in found]
            most = max(most, states.count("Running"))
            done = sum(bool(run.state and run.state.is_final()) for run in found)
            if done == count:
                break
            if time.perf_counter() - started > said + 30:
                said = time.perf_counter() - started
                report(f"{done} of {count} have ended")
            time.sleep(1)
        seconds = time.perf_counter() - started
    lost = []
    if states.count("Completed") != count:
        lost.append(f"{count - states.count('Completed')} runs did not complete")
    if most > limit:
        lost.append(f"{most} ran at once, not {limit}")
    reports = len(list(home.glob("reports/*/result.json")))
    if reports != count:
        lost.append(f"{reports} reports of {count}")
    return Load(f"{count} flow runs queued at once, {limit} at a time", count, seconds, "; ".join(lost))


def _sections() -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(CONFIG)
    return found


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
