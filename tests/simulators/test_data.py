"""Resampling, reference cases and measures."""

import math

import pytest
import torch

from deepzero_core.errors import RequestError
from simulators import wake
from simulators.burgers import Burgers
from simulators.cases import burgers_cases, wake_cases
from simulators.forcing import random_forcing, random_velocity
from simulators.grid import Grid
from simulators.measures import energy_spectrum, mean_absolute_error, relative_error, spectrum_error
from simulators.resample import centred, coarser, vectors

PERIODIC = Grid((16, 16), (32.0, 32.0))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_coarse_fields_keep_sums_and_flow() -> None:
    fields = {"velocity_y": draw(2, 9, 8), "velocity_x": draw(2, 8, 9), "marker": draw(2, 8, 8), "reynolds": draw(2)}
    coarse = coarser(fields, 4)
    assert {name: tuple(value.shape[1:]) for name, value in coarse.items()} == {
        "velocity_y": (3, 2),
        "velocity_x": (2, 3),
        "marker": (2, 2),
        "reynolds": (),
    }
    torch.testing.assert_close(coarse["marker"].sum() * 16, fields["marker"].sum())
    fine_flow = fields["velocity_y"].diff(dim=1) + fields["velocity_x"].diff(dim=2)
    coarse_flow = coarse["velocity_y"].diff(dim=1) + coarse["velocity_x"].diff(dim=2)
    torch.testing.assert_close(coarse_flow, 4 * centred(fine_flow, 4))


def test_coarse_faces_are_where_they_belong() -> None:
    linear = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 2, indexing="ij")).flip(0)  # x in channel 0, y in 1
    x, y = vectors(linear, 4)
    assert x.tolist() == [[0, 4], [0, 4]]
    assert y.tolist() == [[0, 0], [4, 4]]


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(RequestError, match="'pressure'"):
        coarser({"pressure": draw(2, 8, 8)}, 4)
    with pytest.raises(RequestError, match="cannot be made 3 times fewer"):
        coarser({"marker": draw(2, 8, 8)}, 3)


def test_burgers_cases_are_functions_of_their_seed_alone() -> None:
    settings = {"reference": PERIODIC, "factor": 2, "skip": 2, "frames": 5}
    together = burgers_cases([3, 100], **settings)
    (alone,) = burgers_cases([100], **settings)
    assert alone.name == together[1].name == "seed 100"
    assert torch.equal(alone.frames["velocity"], together[1].frames["velocity"])
    assert torch.equal(alone.params["force"], together[1].params["force"])
    assert alone.frames["velocity"].shape == alone.params["force"].shape == (5, 2, 8, 8)
    assert not torch.equal(together[0].frames["velocity"], together[1].frames["velocity"])


def test_the_force_of_a_frame_is_that_of_the_step_behind_it() -> None:
    (case,) = burgers_cases([0], reference=PERIODIC, factor=1, skip=1, frames=3)
    state = {"velocity": case.frames["velocity"][1:2]}
    after = Burgers(PERIODIC).step(state, {"force": case.params["force"][1:2]})
    assert torch.equal(after["velocity"][0], case.frames["velocity"][2])


def test_wake_cases_are_functions_of_their_reynolds_number_alone() -> None:
    settings = {"reference": Grid((64, 32), wake.SIZE), "factor": 2, "skip": 3, "frames": 4}
    together = wake_cases([97.7, 390.6], **settings)
    (alone,) = wake_cases([390.6], **settings)
    for name, value in alone.frames.items():
        assert torch.equal(value, together[1].frames[name])
    assert alone.frames["velocity_y"].shape == (4, 33, 16)
    assert alone.params["reynolds"].tolist() == pytest.approx([390.6] * 4)


def test_no_frames_are_no_case() -> None:
    with pytest.raises(RequestError, match="at least one frame"):
        burgers_cases([0], frames=0)


def test_forces_are_the_sum_of_their_sines() -> None:
    forcing = random_forcing(torch.Generator().manual_seed(0), 3)
    found = forcing.on(PERIODIC)(0.7)[1, 5, 2]
    x, y = 2 * 2.0 + 1.0, 5 * 2.0  # the middle of a lower edge
    wanted = sum(
        float(forcing.amplitude[i, 1])
        * math.sin(
            float(forcing.wave_vector[i, 0]) * x
            + float(forcing.wave_vector[i, 1]) * y
            + float(forcing.phase[i])
            + 0.7 * float(forcing.frequency[i])
        )
        for i in range(3)
    )
    assert float(found) == pytest.approx(wanted, rel=1e-12)
    lengths = random_forcing(torch.Generator().manual_seed(1)).wave_vector.norm(dim=1)
    assert ((lengths >= 0.8) & (lengths <= 1.6)).all()


def test_a_random_velocity_is_the_same_on_every_grid() -> None:
    coarse, fine = (random_velocity(torch.Generator().manual_seed(2), grid) for grid in (PERIODIC, PERIODIC.finer(3)))
    # The middle of a coarse edge is the middle of the middle one of three fine edges.
    torch.testing.assert_close(coarse[0], fine[0, 1::3, ::3])
    assert float(fine.std()) == pytest.approx(2, rel=0.01)
    assert fine.mean((1, 2)).abs().max() < 1e-12


def test_errors_are_those_of_their_formulas() -> None:
    velocity, reference = draw(4, 2, 3, 5), draw(4, 2, 3, 5) + 1
    assert mean_absolute_error(velocity, reference).tolist() == pytest.approx([1.0] * 4)
    wanted = 30 / reference[2].abs().sum()
    assert float(relative_error(velocity, reference)[2]) == pytest.approx(float(wanted))


def test_the_spectrum_holds_all_the_energy() -> None:
    velocity = draw(3, 2, 16, 8)
    torch.testing.assert_close(energy_spectrum(velocity).sum(-1), velocity.square().sum(1).mean((1, 2)) / 2)


def test_a_wave_is_one_number_of_the_spectrum() -> None:
    wave = torch.zeros(2, 16, 16, dtype=torch.float64)
    wave[1] = 3 * torch.sin(2 * math.pi * 5 * torch.arange(16) / 16)
    spectrum = energy_spectrum(wave)
    assert float(spectrum[5]) == pytest.approx(9 / 4)
    assert float(spectrum.sum() - spectrum[5]) == pytest.approx(0, abs=1e-12)


def test_the_spectrum_error_is_the_mean_ratio_in_logarithm() -> None:
    velocity = draw(2, 2, 16, 16)
    assert spectrum_error(velocity, velocity).tolist() == [0, 0]
    assert spectrum_error(2 * velocity, velocity).tolist() == pytest.approx([math.log(4)] * 2)
