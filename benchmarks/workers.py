"""The case `workers`: one estimate of the CNN of five blocks on two Dask workers against one, each on one thread.

Beside it, the same two by tasks of Dask's scheduler instead of lanes, as workers of other machines are asked; and what
the machine has: two workers with a whole estimate each, at once, who share nothing but its memory.
"""

import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import MU, Options, Report
from benchmarks.results import Row
from benchmarks.timing import Contender, clock_of, in_turns
from deepzero_core.data import write_store
from deepzero_core.estimators.cge import DEFAULT_MEMORY
from deepzero_core.perturb.coordinates import count, resolve
from deepzero_core.training import Batch
from infra.cluster import connect
from infra.forward import DistributedCGE
from infra.problem import Problem

TIMEOUT_S = 600.0
_WARM_UP = 4
"""Steps before the first that counts: a run cuts its ranges by what the first two have taken."""


def measure_workers(options: Options, report: Report, *, depth: int = 5, batch: int = 128, size: int = 32) -> list[Row]:
    """All clusters stay up and take turns; what they return has to be the same bits."""
    with (
        tempfile.TemporaryDirectory() as folder,
        connect(1, None, TIMEOUT_S) as single,
        connect(1, None, TIMEOUT_S) as neighbour,
        connect(2, None, TIMEOUT_S) as double,
        ThreadPoolExecutor(2) as pool,
    ):
        problem = problem_of(Path(folder) / "store", depth, batch, size)
        module = problem.build_module()
        step = Batch.of(0, 0, 0, *problem.build_batches().batch(0, 0))
        with (
            DistributedCGE(single, problem, TIMEOUT_S) as one,
            DistributedCGE(neighbour, problem, TIMEOUT_S) as other,
            DistributedCGE(double, problem, TIMEOUT_S) as two,
            DistributedCGE(double, problem, TIMEOUT_S, lanes=False) as by_tasks,
        ):
            coordinates = resolve(module, None)

            def gradients(source: DistributedCGE, chosen: Any) -> Any:
                return source.estimate(module, step, chosen).gradients

            def at_once(chosen: Any) -> Any:
                found, _ = pool.map(gradients, (one, other), (chosen, chosen))
                return found

            contenders = [
                Contender("one worker", lambda chosen: gradients(one, chosen), coordinates, ()),
                Contender("two workers", lambda chosen: gradients(two, chosen), coordinates, ()),
                Contender("two workers by tasks", lambda chosen: gradients(by_tasks, chosen), coordinates, ()),
                Contender("two estimates at once", at_once, coordinates, ()),
            ]
            for step_number in range(_WARM_UP):
                report(f"workers: warming up, step {step_number + 1} of {_WARM_UP}")
                first, second, *_ = (contender.slopes(coordinates) for contender in contenders)
            if any(not torch.equal(first[name], second[name]) for name in first):
                raise AssertionError("two workers return other bits than one")
            times = in_turns(
                contenders,
                options.repeats,
                clock_of(torch.device("cpu")),
                lambda repeat, contender: report(
                    f"workers: {contender.name}, repeat {repeat + 1} of {options.repeats}"
                ),
            )
    about = f"CNN depth {depth}, dense, batch {batch}: two Dask workers"
    baselines = {"one worker": times["one worker"]}
    alone, together = (times[name].seconds for name in ("one worker", "two estimates at once"))
    most = 2 * statistics.median(a / b for a, b in zip(alone, together, strict=True))
    reached = statistics.median(a / b for a, b in zip(alone, times["two workers"].seconds, strict=True))
    notes = (
        f"two workers by tasks instead of lanes: {times['two workers by tasks'].median:.3f} s",
        f"turn by turn, two workers are {reached:.2f} times as fast as one; with an estimate each, at once, which is "
        f"all that this machine has, {most:.2f} times",
    )
    row = Row("workers", about, "float32", "cpu", count(coordinates), times["two workers"], baselines, notes=notes)
    return [row]


def problem_of(
    store: Path, depth: int, batch: int, size: int, *, name: str = "cnn", memory: int = DEFAULT_MEMORY
) -> Problem:
    """A network on random images, as a run would hand it to its workers."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch, 3, size, size), dtype=np.uint8)
    split = images, np.arange(batch) % 10
    names = [str(label) for label in range(10)]
    write_store(
        store, {"train": split, "test": split}, name="random", source="drawn", licence="none", class_names=names
    )
    augmentation = {"crop_padding": 0, "flip": False}
    model = {"name": name, "in_channels": 3, "num_classes": 10, "image_size": size, "depth": depth, "seed": 0}
    return Problem(
        store=store,
        batches={"batch_size": batch, "seed": 0, "augmentation": augmentation},
        model=model,
        mu=MU,
        difference="forward",
        memory=memory,
    )
