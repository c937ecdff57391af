"""Stage: reference runs, computed once, shared out to Dask workers where there are any, the same bits either way."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.states import State

from configs.solver_loop import SolverLoop
from infra.cluster import open_cluster
from simulators.case_store import SPLITS, write_cases
from simulators.cases import Case
from simulators.methods.packing import required
from tasks.loop_problem import open_simulator, reference_cases_on_one_thread
from tasks.progress import Progress
from tasks.records import Cases
from tasks.stage import Stage, Tracking, perform, stage_task


@stage_task("generate")
def generate(tracking: Tracking, loop: SolverLoop) -> State[Cases] | Cases:
    """Training, validation and test cases of the experiment, resampled to the source grid."""
    inputs = {"simulator": loop.simulator, "cases": loop.cases}
    return perform(tracking, "generate", Cases, inputs, lambda stage: _generate(stage, loop))


def _generate(stage: Stage, loop: SolverLoop) -> Cases:
    started = time.perf_counter()
    splits = {split: getattr(loop.cases, split) for split in SPLITS}
    numbers = [number for some in splits.values() for number in some]
    cluster = loop.cluster
    with Progress(stage.title, len(numbers)) as progress:
        cases = (
            reference_cases_on_one_thread(loop, numbers)
            if cluster.workers == 0
            else _shared_out(loop, numbers, progress)
        )
    computed = iter(cases)
    sorted_out = {split: list(itertools.islice(computed, len(some))) for split, some in splits.items()}
    facts: dict[str, Any] = {
        "simulator": loop.simulator.model_dump(mode="json"),
        "cases": loop.cases.model_dump(mode="json"),
    }
    store = write_cases(stage.folder / "cases", sorted_out, facts)
    seconds = time.perf_counter() - started
    stage.run.artifact(store.path / "manifest.json", "cases")
    with open_simulator(loop) as simulator:
        size = required(simulator.state_shapes, simulator.optional).size
    stage.summarise(cases=len(cases), **{"cost/seconds": seconds})
    return Cases(
        store=store.path,
        digest=store.digest,
        name=_name(loop),
        counts={split: len(some) for split, some in splits.items()},
        frames=loop.cases.frames,
        numbers=size,
        seconds=seconds,
    )


def _shared_out(loop: SolverLoop, numbers: Sequence[float], progress: Progress) -> list[Case]:
    """Each worker gets its part at once: cases that are computed together cost less."""
    cluster = loop.cluster
    with open_cluster(cluster, mentions=loop.model_dump(mode="json")) as client:
        workers = max(1, len(client.nthreads()))
        each = -(-len(numbers) // workers)
        parts = [numbers[start : start + each] for start in range(0, len(numbers), each)]
        futures = [client.submit(reference_cases_on_one_thread, loop, part, pure=False) for part in parts]
        cases: list[Case] = []
        for future in futures:
            cases += future.result()
            progress.advance()
    return cases


def _name(loop: SolverLoop) -> str:
    simulator = loop.simulator
    if simulator.kind in ("burgers", "wake"):
        rows, columns = simulator.cells
        return f"{simulator.kind} {rows}×{columns} of {rows * simulator.factor}×{columns * simulator.factor}"
    named: Any = simulator.settings.get("function") or simulator.settings["command"]
    return named if isinstance(named, str) else Path(str(named[0])).name
