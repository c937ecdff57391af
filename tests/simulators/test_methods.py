"""Training in the loop: every method against the exact gradient, what each costs, what a death costs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from deepzero_core import reference
from deepzero_core.errors import RequestError, WorkError
from deepzero_core.models import build_corrector
from deepzero_core.perturb.estimate import GradientEstimate
from deepzero_core.training.sources import Batch, GradientSource, restrict
from simulators.burgers import Burgers
from simulators.cases import Case, burgers_cases, wake_cases
from simulators.function import FunctionSimulator
from simulators.grid import Grid
from simulators.methods import (
    BurgersCoupling,
    Coupling,
    FieldCoupling,
    FirstOrderLoop,
    Loop,
    NonInteractive,
    Scales,
    SplitLoop,
    WakeCoupling,
    Windows,
    ZerothOrderLoop,
    roll_out,
    scales_of,
)
from simulators.methods.adjoint import Differenced, random_directions
from simulators.methods.unrolled import Packed
from simulators.wake import SIZE, Wake

CELLS = 12


def stepped(state: dict, params: dict, viscosity: float) -> dict:
    """Burgers' equation, upwind for positive u, [N, X]; params["inflow"] is added."""
    u = state["u"]
    left, right = torch.roll(u, 1, -1), torch.roll(u, -1, -1)
    return {"u": u - 0.1 * u * (u - left) + viscosity * (right - 2 * u + left) + 0.01 * params["inflow"][:, None]}


def coarse(state: dict, params: dict) -> dict:
    return stepped(state, params, 0.1)


def toy(**settings) -> FunctionSimulator:
    return FunctionSimulator(
        coarse, state_shapes={"u": (CELLS,)}, param_shapes={"inflow": ()}, differentiable=True, **settings
    )


def toy_case(frames: int = 8) -> Case:
    u = 1 + 0.3 * torch.randn(1, CELLS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inflow = torch.linspace(0, 1, frames, dtype=torch.float64)
    states = [u]
    for number in range(frames - 1):
        states.append(stepped({"u": states[-1]}, {"inflow": inflow[number : number + 1]}, 0.02)["u"])
    return Case("toy", {"u": torch.cat(states)}, {"inflow": inflow})


def toy_corrector() -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular")
    return nn.Sequential(conv, nn.Tanh(), nn.Conv1d(2, 1, 3, padding=1, padding_mode="circular")).double()


def toy_loop(steps: int = 3, **settings) -> Loop:
    return Loop(toy(**settings), FieldCoupling("u", Scales((0.3,))), steps)


def batch_of(loop: Loop, cases: list[Case], indices: list[int]) -> Batch:
    return Batch.of(0, 0, 0, *Windows(loop, cases).batch(indices))


def exact(loop: Loop, corrector: nn.Module, batch: Batch) -> GradientEstimate:
    return FirstOrderLoop(loop).estimate(corrector, batch, None)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in gradients.values()])


def distance(found: GradientEstimate, wanted: GradientEstimate) -> float:
    a, b = flat(found.gradients), flat(wanted.gradients)
    return float((a - b).norm() / b.norm())


def test_sol_zo_is_the_exact_gradient_at_its_coordinates() -> None:
    loop, corrector = toy_loop(), toy_corrector()
    batch = batch_of(loop, [toy_case()], [0, 3, 4])
    coordinates = {"0.weight": torch.tensor([0, 4]), "2.weight": torch.tensor([1, 5]), "2.bias": torch.tensor([0])}
    source = ZerothOrderLoop(loop, mu=1e-5, difference="central")
    found, wanted = source.estimate(corrector, batch, coordinates), exact(loop, corrector, batch)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-12)
    assert found.queries == source.cost(corrector, coordinates) == 11
    for name, value in restrict(wanted.gradients, coordinates).items():
        torch.testing.assert_close(found.gradients[name], value, rtol=1e-6, atol=1e-8)


def test_sol_zo_is_the_finite_difference_of_the_reference() -> None:
    loop, corrector = toy_loop(), toy_corrector()
    batch = batch_of(loop, [toy_case()], [0, 3])
    found = ZerothOrderLoop(loop, mu=1e-2).estimate(corrector, batch, None)
    unrolled = loop.unrolled(corrector, loop.packed)
    wanted = reference.cge(unrolled, batch.inputs, batch.targets, loop.loss, mu=1e-2)
    for name, value in found.gradients.items():
        torch.testing.assert_close(value, wanted.gradients[f"corrector.{name}"], rtol=1e-7, atol=1e-9)


def test_sol_zo_never_repeats_the_first_step() -> None:
    loop, corrector = toy_loop(), toy_corrector()
    source, batch = ZerothOrderLoop(loop), batch_of(toy_loop(), [toy_case()], [0, 1, 2, 3])
    coordinates = {"0.weight": torch.tensor([0, 1, 2])}
    source.estimate(corrector, batch, coordinates)
    before = loop.simulator.statistics.steps
    estimate = source.estimate(corrector, batch, coordinates)
    assert loop.simulator.statistics.steps - before == loop.solver_steps(estimate.queries, 4) == 4 * (3 + 3 * 2)


def test_sol_zo_split_is_sol_fo_with_enough_directions() -> None:
    loop, corrector = toy_loop(), toy_corrector()
    batch = batch_of(loop, [toy_case()], [0, 3, 4])
    wanted = exact(loop, corrector, batch)
    errors = [
        distance(SplitLoop(loop, queries, seed=0, mu=1e-5).estimate(corrector, batch, None), wanted)
        for queries in (3, 7, CELLS + 1)
    ]
    assert errors[2] < 1e-5
    assert errors[0] < 0.5  # the state passes through the solver almost unchanged, and that is known
    assert errors[2] < errors[1] < errors[0]


def test_sol_zo_split_costs_the_solver_what_sol_zo_costs() -> None:
    loop = toy_loop()
    source = SplitLoop(loop, 5, seed=0)
    before = loop.simulator.statistics.steps
    estimate = source.estimate(toy_corrector(), batch_of(loop, [toy_case()], [0, 1]), None)
    assert loop.simulator.statistics.steps - before == loop.solver_steps(5, 2)
    assert estimate.queries == source.cost(toy_corrector(), None) == 5


@pytest.mark.parametrize("queries", [CELLS + 1, CELLS + 5, 2 * CELLS + 1, 40])
def test_sol_zo_split_spends_all_its_queries_and_errs_less(queries: int) -> None:
    loop, corrector = toy_loop(), toy_corrector()
    batch = batch_of(loop, [toy_case()], [0, 3, 4])
    before = loop.simulator.statistics.steps
    found = SplitLoop(loop, queries, seed=0, mu=1e-3).estimate(corrector, batch, None)
    assert loop.simulator.statistics.steps - before == loop.solver_steps(queries, 3)
    assert found.queries == queries
    error = distance(found, exact(loop, corrector, batch))
    assert error < (1e-8 if queries > 2 * CELLS else 1e-3)


def test_directions_are_orthonormal_and_repeatable() -> None:
    first, second = (random_directions(5, 9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first @ first.T, torch.eye(5, dtype=torch.float64))
    assert len(random_directions(20, 9, torch.Generator())) == 9


def test_non_is_one_step_without_the_solver() -> None:
    loop, corrector = toy_loop(steps=1), toy_corrector()
    windows = Windows(loop, [toy_case()])
    inputs, targets = windows.pairs()
    before = loop.simulator.statistics.steps
    found = NonInteractive(loop).estimate(corrector, Batch.of(0, 0, 0, inputs, targets), None)
    assert loop.simulator.statistics.steps == before
    wanted = exact(loop, corrector, batch_of(loop, [toy_case()], list(range(len(windows)))))
    assert found.loss == pytest.approx(wanted.loss, rel=1e-12)
    assert distance(found, wanted) < 1e-12


def test_sol_fo_needs_a_simulator_that_can_be_differentiated() -> None:
    box = FunctionSimulator(lambda state, params: state, state_shapes={"u": (CELLS,)})
    with pytest.raises(RequestError, match="FunctionSimulator is not differentiable"):
        FirstOrderLoop(Loop(box, FieldCoupling("u")))


def test_a_death_costs_the_penalty_from_then_on() -> None:
    loop, corrector = toy_loop(limit=5), toy_corrector()
    inputs, targets = Windows(loop, [toy_case()]).batch([0, 3])
    wild = inputs.clone()
    wild[1, :CELLS] = torch.linspace(-20, 20, CELLS)
    sources: list[Callable[[], GradientSource]] = [
        lambda: FirstOrderLoop(loop),
        lambda: ZerothOrderLoop(loop),
        lambda: SplitLoop(loop, 5, seed=0),
    ]
    for source in sources:
        calm = source().estimate(corrector, Batch.of(0, 0, 0, inputs[:1], targets[:1]), None)
        found = source().estimate(corrector, Batch.of(0, 0, 0, wild, targets), None)
        assert found.loss == pytest.approx((calm.loss + 10 * CELLS / 2) / 2)
        # The dead do not move with the corrector: what is left is half of what the living says.
        torch.testing.assert_close(flat(found.gradients), flat(calm.gradients) / 2, rtol=1e-5, atol=1e-7)
    assert loop.simulator.statistics.diverged >= len(sources)


def test_when_all_are_dead_there_is_nothing_to_learn() -> None:
    loop = toy_loop(limit=0.1)
    with pytest.raises(WorkError, match="all 2 simulations of a batch diverged or crashed"):
        ZerothOrderLoop(loop).estimate(toy_corrector(), batch_of(loop, [toy_case()], [0, 1]), None)


def test_a_perturbation_that_kills_costs_the_penalty() -> None:
    """The last step's correction is followed by no solver: two steps, and a limit that the base stays just below."""
    loop, corrector = toy_loop(steps=2), toy_corrector()
    batch = batch_of(loop, [toy_case()], [0])
    with torch.no_grad():
        largest = float(loop.unrolled(corrector, loop.packed)(batch.inputs)[0, :, :-1].abs().max())
    tight = toy_loop(steps=2, limit=largest + 0.5)
    found = ZerothOrderLoop(tight, mu=10.0).estimate(corrector, batch, {"2.bias": torch.tensor([0])})
    assert tight.simulator.statistics.diverged == 1
    assert torch.isfinite(found.gradients["2.bias"]).all()
    assert found.gradients["2.bias"] > 0  # away from it


@pytest.mark.parametrize("method", ["zo", "split"])
def test_a_corrector_is_trained_through_a_solver_that_nobody_can_differentiate(method: str) -> None:
    def opaque(state: dict, params: dict) -> dict:
        tensors = [{name: torch.from_numpy(value) for name, value in some.items()} for some in (state, params)]
        return {"u": coarse(*tensors)["u"].numpy()}

    simulator = FunctionSimulator(opaque, state_shapes={"u": (CELLS,)}, param_shapes={"inflow": ()})
    loop, corrector = replace(toy_loop(), simulator=simulator), toy_corrector()
    batch = batch_of(loop, [toy_case()], [0, 1, 2, 3, 4])
    source = ZerothOrderLoop(loop, mu=1e-5) if method == "zo" else SplitLoop(loop, CELLS + 1, seed=0, mu=1e-5)
    optimizer, losses = torch.optim.Adam(corrector.parameters(), lr=0.02), []
    for number in range(40):
        estimate = source.estimate(corrector, replace(batch, number=number), None)
        for name, parameter in corrector.named_parameters():
            parameter.grad = estimate.gradients[name]
        optimizer.step()
        losses.append(estimate.loss)
    assert losses[-1] < 0.1 * losses[0]


def burgers_problem() -> tuple[Loop, list[Case], nn.Module]:
    grid = Grid((16, 16), (32.0, 32.0))
    cases = [cast(case) for case in burgers_cases([0, 1], reference=grid, factor=2, skip=1, frames=5)]
    coupling = BurgersCoupling(scales_of(BurgersCoupling(Scales((1, 1), (1, 1))), cases))
    corrector = build_corrector("small", 4, padding="circular").double()
    return Loop(Burgers(grid.coarser(2)), coupling, 2), cases, corrector


def wake_problem() -> tuple[Loop, list[Case], nn.Module]:
    grid = Grid((64, 32), SIZE)
    cases = [cast(case) for case in wake_cases([390.6, 781.3], reference=grid, factor=2, skip=5, frames=5)]
    coupling = WakeCoupling(scales_of(WakeCoupling(Scales((1, 1), (1,))), cases))
    return Loop(Wake(grid.coarser(2)), coupling, 2), cases, build_corrector("small", 3).double()


def cast(case: Case) -> Case:
    double = [{name: value.double() for name, value in some.items()} for some in (case.frames, case.params)]
    return Case(case.name, *double)


@pytest.mark.parametrize("problem", [burgers_problem, wake_problem])
def test_the_loop_with_phiflow(problem) -> None:
    torch.manual_seed(0)
    loop, cases, corrector = problem()
    batch = batch_of(loop, cases, [0, 4])
    wanted = exact(loop, corrector, batch)
    coordinates = {
        "layers.0.weight": torch.tensor([3, 111]),
        "last.weight": torch.tensor([0, 77]),
        "last.bias": torch.tensor([1]),
    }
    found = ZerothOrderLoop(loop, mu=1e-6, difference="central").estimate(corrector, batch, coordinates)
    for name, value in restrict(wanted.gradients, coordinates).items():
        torch.testing.assert_close(found.gradients[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max() + 1e-3))
    split = SplitLoop(loop, 1 + loop.packed.state.size, seed=0, mu=1e-5).estimate(corrector, batch, None)
    assert distance(split, wanted) < 1e-3


def test_phiflow_is_traced_from_within_a_black_box() -> None:
    """The first question of all comes from the engine, where torch lets nobody trace."""
    loop, cases, corrector = burgers_problem()
    found = ZerothOrderLoop(loop).estimate(corrector, batch_of(loop, cases, [0]), {"last.bias": torch.tensor([0])})
    assert found.gradients["last.bias"][0] != 0


@pytest.mark.parametrize("problem", [burgers_problem, wake_problem])
def test_a_roll_out_is_the_loop(problem) -> None:
    torch.manual_seed(0)
    loop, cases, corrector = problem()
    inputs, _ = Windows(loop, cases).batch([0])
    with torch.no_grad():
        wanted = loop.unrolled(corrector, loop.packed)(inputs)[0, :, :-1]
    found = roll_out(loop.simulator, loop.coupling, corrector, [without_marker(cases[0])], 2)
    torch.testing.assert_close(found[:, 0].flatten(1), wanted)
    plain = roll_out(loop.simulator, loop.coupling, None, [without_marker(case) for case in cases], 3)
    assert plain.shape[:3] == (3, 2, 2)
    assert not torch.equal(plain[0, 0], found[0, 0])


def without_marker(case: Case) -> Case:
    return Case(case.name, {name: value for name, value in case.frames.items() if name != "marker"}, case.params)


def test_the_dead_of_a_roll_out_stay_dead() -> None:
    case = toy_case()
    wild = Case("wild", {"u": case.frames["u"] * 100}, case.params)
    found = roll_out(toy(limit=5), FieldCoupling("u"), toy_corrector(), [case, wild], 3)
    assert found[:, 0].isfinite().all()
    assert found[:, 1].isnan().all()


def test_windows_hold_the_frames_that_they_should() -> None:
    loop, case = toy_loop(steps=3), toy_case(6)
    windows = Windows(loop, [case, case])
    assert len(windows) == 6
    inputs, targets = windows.batch([4])
    assert torch.equal(inputs[0, :CELLS], case.frames["u"][1])
    assert torch.equal(inputs[0, CELLS:], case.params["inflow"][1:4])
    assert torch.equal(targets[0], case.frames["u"][2:5])
    with pytest.raises(RequestError, match="at least 7 frames: toy"):
        Windows(toy_loop(steps=6), [case])


@pytest.mark.parametrize("coupling", [WakeCoupling(Scales((2, 4), (100,))), BurgersCoupling(Scales((2, 4), (1, 1)))])
def test_a_correction_changes_the_image_and_nothing_else(coupling: Coupling) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"velocity_x": (8, 5), "velocity_y": (9, 4), "velocity": (2, 8, 4)}
    state = {name: torch.randn(3, *shape, generator=generator) for name, shape in shapes.items()}
    params = {"reynolds": torch.tensor([100.0, 200, 400]), "force": torch.randn(3, 2, 8, 4, generator=generator)}
    features = coupling.features(state, params)
    assert features.shape == (3, 2 + len(coupling.scales.extra), 8, 4)
    torch.testing.assert_close(features[:, 1] * 4, coupling.image(state)[:, 1])
    correction = torch.randn(3, 2, 8, 4, generator=generator)
    after = coupling.corrected(state, correction)
    scaled = correction * torch.tensor([2.0, 4.0]).view(2, 1, 1)
    torch.testing.assert_close(coupling.image(after), coupling.image(state) + scaled)
    assert torch.equal(after["velocity_x"][..., -1], state["velocity_x"][..., -1])
    assert torch.equal(after["velocity_y"][:, -1], state["velocity_y"][:, -1])


def test_scales_are_deviations_or_sizes() -> None:
    frames = {"velocity": torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 3}
    force = torch.full((40, 2, 8, 8), 0.5)
    scales = scales_of(BurgersCoupling(Scales((1, 1), (1, 1))), [Case("", frames, {"force": force})])
    assert scales.image == pytest.approx((3, 3), rel=0.05)
    assert scales.extra == (0.5, 0.5)
    with pytest.raises(RequestError, match="zero throughout"):
        scales_of(BurgersCoupling(scales), [Case("", frames, {"force": 0 * force})])


def test_a_loop_has_a_step() -> None:
    with pytest.raises(RequestError, match="at least 1, not 0"):
        toy_loop(steps=0)


def test_the_adjoint_ignores_directions_that_kill() -> None:
    loop = toy_loop(limit=2)
    packed = Packed(loop.simulator)
    question = torch.cat([torch.ones(1, CELLS), torch.zeros(1, 1), torch.ones(1, 1)], 1).double()
    every = torch.eye(CELLS, dtype=torch.float64)
    killing = Differenced(packed, every, mu=100.0)
    gradient = torch.randn(1, CELLS, dtype=torch.float64)
    assert torch.equal(killing.adjoint(question, packed(question), gradient), gradient)
