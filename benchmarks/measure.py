"""One case: the engine against its baselines, in turns, and whether they agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.baselines import Slopes
from benchmarks.cases import Case
from benchmarks.problem import Coordinates, Problem, reuse_flops
from benchmarks.results import Row
from benchmarks.timing import (
    Clock,
    Contender,
    Part,
    by_group,
    by_parameter,
    clock_of,
    in_turns,
    peak_flops,
    settled,
)
from deepzero_core import cge
from deepzero_core.estimators.cge import DEFAULT_MEMORY, slope
from deepzero_core.perturb import BasePass, Chunk, Evaluator, prepare
from deepzero_core.perturb.coordinates import count
from deepzero_core.perturb.objective import state_of

Report = Callable[[str], None]

MU = 5e-3
WHOLE_ENGINE, WHOLE_BASELINE = 60.0, 10.0
"""Seconds up to which an estimate is timed whole."""
GROUPS = 4
"""Parts on which a baseline is timed that spends the same on every coordinate."""
VMAP_GROUPS, SLOW_VMAP_GROUPS = 12, 3
"""Parts on which vmap is timed: it computes once what comes before the perturbed parameter. Fewer where it is slow."""
CHECKED_GROUPS, CHECKED = 16, 2
CHUNKS = (2, 8, 32)
"""Coordinates at once that vmap is tried with."""


@dataclass(frozen=True)
class Options:
    """What every case is measured with."""

    repeats: int = 3
    precisions: tuple[str, ...] = ("float32",)
    device: str = "cpu"


def measure(case: Case, options: Options, report: Report) -> list[Row]:
    """One row per precision; the baselines are timed once for all of them."""
    device = torch.device(options.device)
    problem = case.build().to(device)
    coordinates = {name: indices.to(device) for name, indices in case.coordinates(problem.module).items()}
    clock = clock_of(device)
    engines = _engines(problem, coordinates, options.precisions)
    others, notes = _baselines(problem, coordinates, case.sample, clock)
    contenders, expected = [], []
    limits = [WHOLE_ENGINE] * len(engines) + [WHOLE_BASELINE] * len(others)
    for contender, limit in zip([*engines, *others], limits, strict=True):
        report(f"{case.name}: {contender.name}, warming up")
        ready, seconds = settled(contender, limit, clock)
        contenders.append(ready)
        if contender.parts and not ready.parts:
            notes += (f"{contender.name}: timed whole; a sample of it gave {seconds:.3g} s",)
        expected.append(seconds)

    def progress(repeat: int, contender: Contender) -> None:
        left = sum(expected) * (options.repeats - repeat - 1) + sum(expected[contenders.index(contender) :])
        report(f"{case.name}: {contender.name}, repeat {repeat + 1} of {options.repeats}, case done in {left:.0f} s")

    times = in_turns(contenders, options.repeats, clock, progress)
    report(f"{case.name}: comparing with float64")
    peak = peak_flops(device)
    flops, checked = reuse_flops(problem, coordinates), _sampled(by_group(coordinates, CHECKED_GROUPS, CHECKED))
    exact = baselines.feature_reuse(problem.to(torch.float64), MU)(checked)
    paper_error = relative_error(baselines.feature_reuse(problem, MU)(checked), exact)
    return [
        Row(
            case.name,
            case.about,
            precision,
            device.type,
            count(coordinates),
            times[own.name],
            {other.name: times[other.name] for other in others},
            relative_error(own.slopes(checked), exact),
            paper_error,
            flops,
            peak,
            notes,
        )
        for precision, own in zip(options.precisions, engines, strict=True)
    ]


def engine(problem: Problem, mu: float, precision: str, evaluator: Evaluator) -> Slopes:
    """deepzero's estimate; see `baselines`."""
    module, inputs, targets, loss_fn = problem.module, problem.inputs, problem.targets, problem.loss_fn

    def slopes(coordinates: Coordinates) -> dict[str, Tensor]:
        estimate = cge(
            module, inputs, targets, loss_fn, mu=mu, coordinates=coordinates, precision=precision, evaluator=evaluator
        )
        return {name: estimate.gradients[name].flatten()[indices] for name, indices in coordinates.items()}

    return slopes


def prepared_engine(mu: float, precision: str, evaluator: Evaluator, base: BasePass) -> Slopes:
    """The same from a base pass that is there, each parameter's coordinates as one chunk."""
    return lambda coordinates: {
        name: slope(evaluator, base, Chunk(name, indices), mu, "forward", precision)
        for name, indices in coordinates.items()
        if len(indices)
    }


def relative_error(found: Coordinates, exact: Coordinates) -> float:
    """‖found − exact‖/‖exact‖ over all parameters."""
    one, other = (torch.cat([slopes[name].double() for name in exact]) for slopes in (found, exact))
    return float((one - other).norm() / other.norm())


def _engines(problem: Problem, coordinates: Coordinates, precisions: Sequence[str]) -> list[Contender]:
    """The engine at each precision; where it takes long, a chunk of each parameter is timed."""
    evaluator = prepare(problem.module, problem.inputs, problem.targets, problem.loss_fn)
    base = evaluator.base(*state_of(problem.module), problem.inputs, problem.targets)
    parts = by_parameter(coordinates, lambda name: evaluator.chunk_size(base, name, DEFAULT_MEMORY))
    return [
        Contender(
            f"engine {precision}",
            engine(problem, MU, precision, evaluator),
            coordinates,
            parts,
            prepared_engine(MU, precision, evaluator, base),
        )
        for precision in precisions
    ]


def _baselines(
    problem: Problem, coordinates: Coordinates, sample: int, clock: Clock
) -> tuple[list[Contender], tuple[str, ...]]:
    """The baselines that can run here, and notes on them."""
    uniform = by_group(coordinates, GROUPS, sample)
    chunk, groups, slopes = _best_vmap(problem, uniform[len(uniform) // 2].name, clock)
    found = [
        Contender(
            "feature reuse",
            baselines.feature_reuse(problem, MU),
            coordinates,
            by_parameter(coordinates, lambda _: sample),
        ),
        Contender("no reuse", baselines.no_reuse(problem, MU), coordinates, uniform),
        Contender("vmap", slopes, coordinates, by_group(coordinates, groups, chunk)),
    ]
    notes: tuple[str, ...] = (f"vmap: {chunk} coordinates at once",)
    try:
        found.append(Contender("torchzero", baselines.torchzero(problem, MU), coordinates, uniform))
    except ImportError:
        notes += ("torchzero is not installed: pip install -c constraints.txt -e '.[bench]'",)
    return found, notes


def _best_vmap(problem: Problem, name: str, clock: Clock) -> tuple[int, int, Slopes]:
    """The chunk size, of a few, with the least time per coordinate of one parameter, and how many parts to time."""
    numel = problem.module.get_parameter(name).numel()
    costs = {}
    for chunk in CHUNKS:
        indices = torch.arange(min(chunk, numel), device=problem.inputs.device)
        slopes = baselines.vmapped(problem, MU, chunk)
        started = clock()
        slopes({name: indices})
        spent = clock() - started
        costs[chunk] = spent / len(indices), slopes
        if spent > WHOLE_BASELINE:
            break
    best = min(costs, key=lambda chunk: costs[chunk][0])
    slow = best * costs[best][0] > WHOLE_BASELINE / VMAP_GROUPS
    return best, SLOW_VMAP_GROUPS if slow else VMAP_GROUPS, costs[best][1]


def _sampled(parts: Sequence[Part]) -> dict[str, Tensor]:
    return {part.name: part.indices for part in parts}
