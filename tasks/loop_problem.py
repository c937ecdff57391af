"""From the configuration of a solver in the loop to simulators, couplings and correctors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from configs.solver_loop import PHIFLOW, SimulatorConfig, SolverLoop
from deepzero_core.callables import reason, resolve
from deepzero_core.errors import RequestError
from deepzero_core.models import build_corrector
from deepzero_core.models.custom import call, seeded
from simulators import burgers, methods, wake
from simulators.case_store import SPLITS, CaseStore
from simulators.cases import Case, burgers_cases, wake_cases
from simulators.grid import Grid
from simulators.methods.packing import required
from simulators.own import own_simulator
from simulators.protocol import Simulator
from tasks.records import Cases


def source_grid(simulator: SimulatorConfig) -> Grid:
    """That of the solver; RequestError as `Grid`."""
    rows, columns = simulator.cells
    return Grid((rows, columns), (simulator.size, simulator.size) if simulator.kind == "burgers" else wake.SIZE)


def lowest_reynolds(loop: SolverLoop) -> float:
    """The most viscous case of the wake."""
    return min(*loop.cases.train, *loop.cases.validation, *loop.cases.test)


@contextmanager
def open_simulator(loop: SolverLoop) -> Iterator[Simulator]:
    """The solver of the experiment; a program of the user's ends with the block.

    RequestError: settings that the simulator does not take, a function that cannot be imported.
    """
    config = loop.simulator
    if config.kind == "burgers":
        yield burgers.Burgers(source_grid(config), dt=config.dt, viscosity=config.viscosity)
        return
    if config.kind == "wake":
        yield wake.Wake(source_grid(config), lowest_reynolds=lowest_reynolds(loop))
        return
    own = own_simulator(config.kind, config.settings)
    try:
        yield own
    finally:
        own.close()


def reference_cases(loop: SolverLoop, numbers: Sequence[float]) -> list[Case]:
    """Reference runs on the source grid, each a function of its number alone.

    RequestError: own cases that are not what they should be. WorkError: a run that diverges.
    """
    cases, config = loop.cases, loop.simulator
    if config.kind == "burgers":
        return burgers_cases(
            [int(number) for number in numbers],
            reference=source_grid(config).finer(config.factor),
            factor=config.factor,
            skip=cases.skip,
            frames=cases.frames,
            dt=config.dt,
            viscosity=config.viscosity,
        )
    if config.kind == "wake":
        return wake_cases(
            numbers,
            reference=source_grid(config).finer(config.factor),
            factor=config.factor,
            skip=cases.skip,
            frames=cases.frames,
            marker=False,
        )
    return [_own_case(loop, int(number)) for number in numbers]


def reference_cases_on_one_thread(loop: SolverLoop, numbers: Sequence[float]) -> list[Case]:
    """The same here as on a worker, which computes on one thread: sums over several threads are other sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return reference_cases(loop, numbers)
    finally:
        torch.set_num_threads(threads)


def _own_case(loop: SolverLoop, number: int) -> Case:
    name = str(loop.cases.function)
    made: Any
    try:
        made = resolve(name, what="cases.function")(number, loop.cases.skip, loop.cases.frames)
        frames, params = ({key: torch.as_tensor(value) for key, value in some.items()} for some in made)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"cases.function {name!r} failed for case {number}: {reason(error)}") from error
    for what, fields in (("state", frames), ("param", params)):
        shapes: Any = loop.simulator.settings.get(f"{what}_shapes", {})
        wanted = {key: [loop.cases.frames, *shape] for key, shape in shapes.items()}
        found = {key: list(value.shape) for key, value in fields.items()}
        if found != wanted:
            raise RequestError(f"cases.function {name!r} gave {what} fields of the shapes {found}, not {wanted}")
    return Case(f"case {number}", frames, params)


def coupling_of(loop: SolverLoop, train: Sequence[Case]) -> methods.Coupling:
    """How corrector and solver meet, in units of the training cases' standard deviations."""
    kind = loop.simulator.kind
    if kind not in PHIFLOW:
        field = str(loop.simulator.field)
        return methods.FieldCoupling(field, methods.scales_of(methods.FieldCoupling(field), train))
    build = methods.BurgersCoupling if kind == "burgers" else methods.WakeCoupling
    ones = methods.Scales((1.0, 1.0), (1.0,) * (2 if kind == "burgers" else 1))
    return build(methods.scales_of(build(ones), train))


def corrector_of(loop: SolverLoop, features: Tensor, channels: int, seed: int) -> nn.Module:
    """The corrector before any training, a function of the seed.

    features: [N, C + E, …], what it will see; it answers with [N, channels, …].
    RequestError: one's own that cannot be built, or answers something else.
    """
    config = loop.corrector
    with seeded(seed):
        if ":" not in config.name:
            padding = "circular" if loop.simulator.kind == "burgers" else "zeros"
            return build_corrector(config.name, features.shape[1], padding=padding)
        module = call(config.name, config.arguments)
        wanted = (len(features), channels, *features.shape[2:])
        try:
            with torch.no_grad():
                found = tuple(module(features).shape)
        except Exception as error:
            raise RequestError(
                f"corrector {config.name!r} cannot take {list(features.shape)}: {reason(error)}"
            ) from error
    if found != wanted:
        raise RequestError(f"corrector {config.name!r} answers {list(found)}, where it must be {list(wanted)}")
    return module


def reference_images(coupling: methods.Coupling, cases: Sequence[Case], frames: int) -> Tensor:
    """[T, N, C, …]: what a roll-out is compared with, from the second frame on."""
    return torch.stack([coupling.image(case.frames)[1 : frames + 1] for case in cases], 1)


def blank_features(loop: SolverLoop, simulator: Simulator) -> tuple[Tensor, int]:
    """([2, C + E, …], C): what a corrector sees and how many channels it corrects, before there are any data."""
    kind = loop.simulator.kind
    state, params = required(simulator.state_shapes, simulator.optional).shapes, simulator.param_shapes
    fields = [{name: torch.zeros(2, *shape) for name, shape in shapes.items()} for shapes in (state, params)]
    coupling: methods.Coupling
    if kind in PHIFLOW:
        build = methods.BurgersCoupling if kind == "burgers" else methods.WakeCoupling
        coupling = build(methods.Scales((1.0, 1.0), (1.0,) * (2 if kind == "burgers" else 1)))
    else:
        coupling = methods.FieldCoupling(str(loop.simulator.field))
    return coupling.features(*fields), coupling.image(fields[0]).shape[1]


class Setting:
    """Everything that training and roll-out have in common: the simulator and what is known of the cases."""

    def __init__(self, loop: SolverLoop, cases: Cases, simulator: Simulator) -> None:
        store = CaseStore.open(cases.store)
        self.loop, self.simulator = loop, simulator
        self.train, self.validation, self.test = (store.cases(split) for split in SPLITS)
        self.coupling = coupling_of(loop, self.train)
        self.unrolled = methods.Loop(simulator, self.coupling, loop.longest, loop.training.penalty)

    def features(self) -> Tensor:
        """[1, C + E, …] of the first frame, as an example."""
        case = self.train[0]
        some = [{name: value[:1] for name, value in fields.items()} for fields in (case.frames, case.params)]
        return self.coupling.features(*some)

    def corrector(self, seed: int) -> nn.Module:
        """As `corrector_of`, of the type of the data."""
        features = self.features()
        return corrector_of(self.loop, features.float(), len(self.coupling.scales.image), seed).to(features.dtype)
