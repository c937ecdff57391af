"""Wake flow and Burgers: compiled and in batches they are PhiFlow's own steps; the physics is right."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deepzero_core.errors import RequestError
from simulators.burgers import Burgers
from simulators.contained import Contained
from simulators.grid import Grid
from simulators.protocol import State, alive
from simulators.validation import boundary_flux, burgers_error, order
from simulators.wake import SIZE, Wake, viscosity

SMALL = Grid((32, 16), SIZE)
"""Of the wake: the disc is 3 cells wide, and every part of the step is there."""


@dataclass(frozen=True)
class Flow:
    """A simulator and three different simulations, a few steps old."""

    simulator: Contained
    state: State
    params: State


def wake(dtype: torch.dtype, channel: bool = False) -> Flow:
    simulator = Wake(SMALL, channel=channel)
    state, params = simulator.start(3, dtype=dtype), {"reynolds": torch.tensor([97.7, 400, 3125], dtype=dtype)}
    for _ in range(2):
        state = simulator.step(state, params)
    return Flow(simulator, state, params)


def burgers(dtype: torch.dtype) -> Flow:
    generator = torch.Generator().manual_seed(0)
    velocity, force = torch.randn(2, 3, 2, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
    return Flow(Burgers(Grid((12, 12), (12.0, 12.0))), {"velocity": velocity}, {"force": force})


FLOWS: dict[str, Callable[[torch.dtype], Flow]] = {
    "wake": wake,
    "wake in a channel": lambda dtype: wake(dtype, channel=True),
    "burgers": burgers,
}
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_a_step_is_phiflows(name: str, dtype: torch.dtype) -> None:
    flow = FLOWS[name](dtype)
    tight = {} if name == "burgers" else {"tolerance": 1e-6 if dtype == torch.float32 else 1e-12}
    fast, slow = flow.simulator.step(flow.state, flow.params), flow.simulator.eager(flow.state, flow.params, **tight)
    for field, value in slow.items():
        assert fast[field].dtype == dtype
        assert not torch.equal(value, flow.state[field])
        torch.testing.assert_close(fast[field], value, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", FLOWS)
def test_no_simulation_knows_of_the_others(name: str) -> None:
    flow = FLOWS[name](torch.float32)
    rows = torch.tensor([0, 1, 2, 1, 0])
    many = flow.simulator.step(
        *({key: value[rows] for key, value in some.items()} for some in (flow.state, flow.params))
    )
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in flow.state.items()}
        alone = flow.simulator.step(one, {key: value[row : row + 1] for key, value in flow.params.items()})
        for field, value in alone.items():
            assert torch.equal(value[0], many[field][row])


@pytest.mark.parametrize("name", FLOWS)
def test_the_derivative_is_that_of_the_step(name: str) -> None:
    flow = FLOWS[name](torch.float64)
    generator = torch.Generator().manual_seed(1)
    weights = {
        field: torch.randn(value.shape, generator=generator, dtype=value.dtype) for field, value in flow.state.items()
    }
    along = {
        field: torch.randn(value.shape, generator=generator, dtype=value.dtype) for field, value in flow.state.items()
    }

    def objective(state: State) -> Tensor:
        after = flow.simulator.step(state, flow.params)
        return sum((after[field] * weights[field]).sum() for field in weights)

    leaves = {field: value.clone().requires_grad_() for field, value in flow.state.items()}
    gradients = torch.autograd.grad(objective(leaves), list(leaves.values()))
    found = sum(float((gradient * along[field]).sum()) for gradient, field in zip(gradients, leaves, strict=True))

    # Semi-Lagrangian advection has kinks where a path ends at a grid point: a small step meets few of them.
    mu = 1e-7
    above, below = (
        objective({field: value + sign * mu * along[field] for field, value in flow.state.items()}) for sign in (1, -1)
    )
    assert found == pytest.approx(float(above - below) / (2 * mu), rel=1e-5)


@pytest.mark.parametrize("channel", [False, True])
def test_the_wake_is_free_of_divergence_and_its_fluxes_balance(channel: bool) -> None:
    flow = wake(torch.float64, channel)
    simulator = flow.simulator
    after = simulator.step(flow.state, flow.params)
    divergence = simulator.projection.divergence(after["velocity_y"], after["velocity_x"])
    assert divergence.abs().max() < 1e-14
    inflow, net = boundary_flux(after, SMALL.spacing)
    assert net.abs().max() < 1e-11 * inflow.min()
    if channel:
        torch.testing.assert_close(inflow, torch.full_like(inflow, SIZE[1]))
        assert after["velocity_x"][..., [0, -1]].abs().max() == 0
    else:
        assert ((0.9 * SIZE[1] < inflow) & (inflow < 1.1 * SIZE[1])).all()


def test_nothing_flows_through_the_disc() -> None:
    flow = wake(torch.float64)
    projection = flow.simulator.projection
    for field, open_faces in (("velocity_y", projection.open_y), ("velocity_x", projection.open_x)):
        assert (~open_faces).any()
        assert flow.state[field][:, ~open_faces].abs().max() == 0


def test_a_projection_changes_nothing_that_is_free_of_divergence() -> None:
    flow = wake(torch.float64)
    once = flow.state["velocity_y"], flow.state["velocity_x"]
    for before, after in zip(once, flow.simulator.projection(*once), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-13)


def test_marker_is_fed_in_and_carried_without_changing_the_velocity() -> None:
    simulator = Wake(SMALL)
    params = {"reynolds": torch.tensor([400.0])}
    marked, plain = simulator.start(1, marker=True), simulator.start(1)
    for _ in range(12):
        marked, plain = simulator.step(marked, params), simulator.step(plain, params)
    assert torch.equal(marked["velocity_y"], plain["velocity_y"])
    marker = marked["marker"][0]
    front = torch.nonzero(marker.amax(1) > 0.1).max() * SMALL.spacing
    assert 10 < front < 35  # fed in at y = 5 … 10, carried for 12 units of time at a speed of 1, and smeared
    assert marker.min() >= 0


def test_the_disc_sheds_what_it_is_poked_to() -> None:
    simulator = Wake(SMALL)
    state, params = simulator.start(2), {"reynolds": torch.tensor([400.0, 3125.0])}
    for _ in range(60):
        state = simulator.step(state, params)
    assert alive(state).all()
    assert state["velocity_x"][:, 14:, 8].abs().amax(1).min() > 1e-3


def test_viscosity_is_the_same_on_every_grid() -> None:
    assert viscosity(100.0) == 0.2
    assert (Wake(SMALL).substeps, Wake(Grid((256, 128), SIZE)).substeps) == (1, 2)
    assert (Burgers(Grid((32, 32), (32.0, 32.0))).substeps, Burgers(Grid((128, 128), (32.0, 32.0))).substeps) == (1, 1)


def test_a_reynolds_number_below_the_lowest_is_refused() -> None:
    simulator = Wake(SMALL, lowest_reynolds=100)
    with pytest.raises(RequestError, match="a Reynolds number of 90 is below lowest_reynolds"):
        simulator.step(simulator.start(1), {"reynolds": torch.tensor([90.0])})


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: Wake(Grid((32, 16), (20.0, 10.0))), "is not inside a domain"),
        (lambda: Wake(SMALL, dt=0), "dt and lowest_reynolds must be positive"),
        (lambda: Burgers(dt=-1), "dt must be positive"),
        (lambda: Grid((32, 32), SIZE), "cells of a grid must be square"),
        (lambda: Grid((1, 32), SIZE), "at least 2 cells"),
        (lambda: SMALL.coarser(3), "cannot be coarsened 3 times"),
    ],
)
def test_what_cannot_be_is_refused(wrong: Callable[[], object], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        wrong()


def test_burgers_converges_to_the_cole_hopf_solution_at_first_order() -> None:
    cells = (12, 24, 48)
    errors = [burgers_error(count, count // 2) for count in cells]
    assert errors[-1] < 0.02
    assert order([1 / count for count in cells], errors) == pytest.approx(1, abs=0.12)


def test_a_diverging_simulation_leaves_the_others_alone() -> None:
    flow = burgers(torch.float32)
    wild = {"velocity": flow.state["velocity"].clone()}
    wild["velocity"][1] = 1e4
    after, calm = flow.simulator.step(wild, flow.params), flow.simulator.step(flow.state, flow.params)
    assert alive(after).tolist() == [True, False, True]
    assert torch.equal(after["velocity"][[0, 2]], calm["velocity"][[0, 2]])
    assert flow.simulator.statistics.diverged == 1


@pytest.mark.parametrize("name", FLOWS)
def test_a_pickled_simulator_answers_the_same(name: str) -> None:
    flow = FLOWS[name](torch.float32)
    copy = pickle.loads(pickle.dumps(flow.simulator))
    for field, value in flow.simulator.step(flow.state, flow.params).items():
        assert torch.equal(copy.step(flow.state, flow.params)[field], value)
