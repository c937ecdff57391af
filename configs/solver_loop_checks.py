"""Combinations of a solver in the loop that cannot run; see `configs.checks`."""

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from configs.checks import CALLABLE, Problem, cluster, comparison
from configs.facts import CORRECTORS, LOWEST_REYNOLDS, SIMULATORS
from configs.solver_loop import ASKING, PHIFLOW, SimulatorConfig
from deepzero_core.errors import suggest

if TYPE_CHECKING:
    from configs.solver_loop import SolverLoop

_SPLITS = {"train": "training", "validation": "validation"}


def _simulator(loop: "SolverLoop") -> Iterator[Problem]:
    simulator = loop.simulator
    if simulator.kind in PHIFLOW:
        yield from _phiflow(simulator)
        return
    needed, optional = SIMULATORS[simulator.kind]
    for key in simulator.settings:
        if key not in (*needed, *optional):
            reason = f"a simulator of kind {simulator.kind!r} has no such setting; {suggest(key, (*needed, *optional))}"
            yield f"simulator.settings.{key}", reason
    for key in needed:
        if key not in simulator.settings:
            yield f"simulator.settings.{key}", f"a simulator of kind {simulator.kind!r} needs it"
    for key in ("state_shapes", "param_shapes"):
        yield from _shapes(f"simulator.settings.{key}", simulator.settings.get(key, {}))
    shapes = simulator.settings.get("state_shapes")
    if simulator.field is None:
        yield "simulator.field", "name the field of the state that is to be corrected"
    elif isinstance(shapes, dict) and simulator.field not in shapes:
        yield "simulator.field", f"the state has no field {simulator.field!r}; {suggest(simulator.field, shapes)}"
    for key in ("cells", "factor", "size", "dt", "viscosity"):
        if getattr(simulator, key) != SimulatorConfig.model_fields[key].default:
            yield f"simulator.{key}", f"it is for {' and '.join(PHIFLOW)}; your own simulator has its settings"


def _phiflow(simulator: SimulatorConfig) -> Iterator[Problem]:
    for key in ("settings", "field"):
        if getattr(simulator, key):
            yield f"simulator.{key}", f"it is for your own simulator, but simulator.kind is {simulator.kind!r}"
    rows, columns = simulator.cells
    if min(rows, columns) < 4:
        yield "simulator.cells", f"a grid of {rows} × {columns} cells is too coarse: at least 4 along each axis"
    elif simulator.kind == "burgers" and rows != columns:
        yield "simulator.cells", f"the domain of burgers is square, but {rows} × {columns} cells are not"
    elif simulator.kind == "wake" and rows != 2 * columns:
        yield "simulator.cells", f"the channel is twice as long as wide, but {rows} × {columns} cells are not"


def _shapes(key: str, shapes: object) -> Iterator[Problem]:
    lengths = shapes.values() if isinstance(shapes, dict) else [None]
    if not all(isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) for shape in lengths):
        yield key, "it gives every field the shape of one simulation, such as {velocity: [24]}"


def _cases(loop: "SolverLoop") -> Iterator[Problem]:
    cases, kind = loop.cases, loop.simulator.kind
    splits = ("train", "validation", "test")
    for key in splits:
        numbers = getattr(cases, key)
        if len(set(numbers)) < len(numbers):
            yield f"cases.{key}", "a case stands there twice"
        if kind == "wake" and min(numbers, default=LOWEST_REYNOLDS) < LOWEST_REYNOLDS:
            yield f"cases.{key}", f"Reynolds numbers of the wake are at least {LOWEST_REYNOLDS}, not {min(numbers):g}"
        if kind != "wake" and any(number != int(number) for number in numbers):
            yield f"cases.{key}", "seeds are whole numbers"
    for one, other in itertools.combinations(splits, 2):
        if both := sorted(set(getattr(cases, one)) & set(getattr(cases, other))):
            yield f"cases.{other}", f"{both[0]:g} is a {_SPLITS[one]} case, too"
    if cases.frames <= loop.longest:
        yield "cases.frames", f"a loop of {loop.longest} steps needs at least {loop.longest + 1} frames"
    if loop.rollout.frames >= cases.frames:
        reason = f"{cases.frames} frames of a case are one more than the steps that can be compared"
        yield "rollout.frames", f"{reason}: at most {cases.frames - 1}"
    if kind in PHIFLOW and cases.function is not None:
        yield "cases.function", f"it is for your own simulator: the cases of {kind!r} are known"
    if kind not in PHIFLOW and not _is_callable(cases.function):
        yield "cases.function", "your own simulator needs your own cases, as package.module:callable"


def _corrector(loop: "SolverLoop") -> Iterator[Problem]:
    name = loop.corrector.name
    if ":" in name:
        if not _is_callable(name):
            yield "corrector.name", f"{name!r} does not have the form package.module:callable"
        return
    if name not in CORRECTORS:
        hint = suggest(name, CORRECTORS)
        yield "corrector.name", f"there is no corrector {name!r}; {hint} (your own is named package.module:callable)"
    elif loop.simulator.kind not in PHIFLOW:
        yield "corrector.name", f"{name!r} corrects velocities in the plane; name your own as package.module:callable"
    if loop.corrector.arguments:
        yield "corrector.arguments", f"{name!r} takes none; they are for your own callable"


def _methods(loop: "SolverLoop") -> Iterator[Problem]:
    training = loop.training
    own = [("training.method", training.method)]
    for key, method in [*own, *((f"baselines.{i}", method) for i, method in enumerate(loop.baselines))]:
        if method == "sol-fo" and loop.simulator.kind == "external":
            yield key, "'sol-fo' differentiates the solver, and a program cannot be differentiated"
    for method in training.mu:
        if method not in ASKING:
            yield f"training.mu.{method}", f"only {' and '.join(ASKING)} have finite differences"


def _training(loop: "SolverLoop") -> Iterator[Problem]:
    training = loop.training
    before = sum(stage.steps for stage in training.curriculum)
    if before >= training.steps:
        yield "training.curriculum", f"it takes {before} of {training.steps} steps and leaves none for training.unroll"


def _is_callable(name: str | None) -> bool:
    return name is not None and CALLABLE.fullmatch(name) is not None


CHECKS: tuple[Callable[["SolverLoop"], Iterator[Problem]], ...] = (
    _simulator,
    _cases,
    _corrector,
    _methods,
    _training,
    comparison,
    cluster,
)
