"""A step on two workers, and on the same two with a third that takes ten times as long for everything it evaluates."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed import Client

from benchmarks.measure import Report
from benchmarks.workers import problem_of
from deepzero_core.training import Batch
from infra.cluster import connect
from infra.forward import DistributedCGE

SLOWER = 10
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class SlowWorker:
    """Median seconds of a step; what was asked again in a step on average, and on how many workers chunks ran."""

    two: float
    with_slow: float
    with_equal_share: float
    """What the step would take if the slow one had a third of the work."""
    asked_again: float

    @property
    def ratio(self) -> float:
        return self.with_slow / self.two


def measure(repeats: int, report: Report, *, depth: int = 5, batch: int = 128, size: int = 32) -> SlowWorker:
    """The CNN of `benchmarks.workers`, each number of workers in turn."""
    with tempfile.TemporaryDirectory() as folder:
        problem = problem_of(Path(folder) / "store", depth, batch, size)
        module = problem.build_module().train()
        step = Batch.of(0, 0, 0, *problem.build_batches().batch(0, 0))
        times: dict[int, float] = {}
        again = 0.0
        for workers in (2, 3):
            with connect(workers, None, _TIMEOUT_S) as client, DistributedCGE(client, problem, _TIMEOUT_S) as source:
                for warm in range(2):
                    report(f"{workers} workers, warming up, {warm + 1} of 2")
                    source.estimate(module, step, None)
                if workers == 3:
                    _slow_down(client)
                    source.estimate(module, step, None)
                seconds: list[float] = []
                before = source.asked_again
                for repeat in range(repeats):
                    report(f"{workers} workers, step {repeat + 1} of {repeats}")
                    began = time.perf_counter()
                    source.estimate(module, step, None)
                    seconds.append(time.perf_counter() - began)
                times[workers], again = statistics.median(seconds), (source.asked_again - before) / repeats
    return SlowWorker(times[2], times[3], SLOWER * times[2] * 2 / 3, again)


def _slow_down(client: Client) -> None:
    """Of one worker: after each chunk it sleeps nine times as long as the chunk took, which takes nobody's core."""

    def slow(times: int) -> None:
        from infra import forward_worker

        real = forward_worker.slope

        def slower(*arguments: object) -> object:
            began = time.perf_counter()
            found = real(*arguments)  # type: ignore[arg-type]
            time.sleep((times - 1) * (time.perf_counter() - began))
            return found

        forward_worker.slope = slower

    workers: Sequence[str] = list(client.nthreads())
    client.run(slow, SLOWER, workers=[workers[0]])


def show(found: SlowWorker) -> None:
    print(
        f"two workers {found.two:.3g} s; and one {SLOWER} times slower {found.with_slow:.3g} s, {found.ratio:.2f} "
        f"times as long ({found.asked_again:.1f} ranges asked again in a step); with a third of the work on the slow "
        f"one it would be {found.with_equal_share:.3g} s"
    )
