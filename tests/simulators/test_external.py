"""Programs that cannot be seen into: asked through pipes and files, crashing, hanging, talking nonsense."""

import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from deepzero_core.errors import RequestError
from deepzero_core.training.sources import Batch
from simulators import examples
from simulators.cases import Case
from simulators.external import ExternalProgram
from simulators.methods import FieldCoupling, Loop, Windows, ZerothOrderLoop
from simulators.protocol import alive

CELLS = 24
SHAPES = {"velocity": (CELLS,)}


@pytest.fixture(scope="session")
def burgers1d(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = tmp_path_factory.mktemp("program") / "burgers1d"
    source = Path(examples.__file__).parent / "burgers1d.c"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source), "-lm"]
    subprocess.run(command, check=True, timeout=60)
    return str(program)


@pytest.fixture
def opened() -> Iterator[list[ExternalProgram]]:
    """Programs that are closed after the test."""
    programs: list[ExternalProgram] = []
    yield programs
    for program in programs:
        program.close()


def velocity(count: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"velocity": torch.randn(count, CELLS, generator=generator, dtype=torch.float64)}


def same_in_torch(u: torch.Tensor, viscosity: float, dt: float) -> torch.Tensor:
    left, right = u.roll(1, 1), u.roll(-1, 1)
    slope = torch.where(u > 0, u - left, right - u)
    return u - dt * u * slope + dt * viscosity * (left - 2 * u + right)


def test_the_worked_example_in_c(burgers1d: str, opened: list[ExternalProgram]) -> None:
    program = ExternalProgram([burgers1d, "0.1", "0.05"], state_shapes=SHAPES, batch_size=2)
    opened.append(program)
    state, expected = velocity(), velocity()["velocity"]
    for _ in range(3):
        state, expected = program.step(state, {}), same_in_torch(expected, 0.1, 0.05)
    torch.testing.assert_close(state["velocity"], expected, rtol=1e-12, atol=1e-12)
    assert (program.statistics.steps, program.statistics.restarts) == (15, 0)


def test_a_program_that_crashes_once_is_started_again(
    burgers1d: str, tmp_path: Path, opened: list[ExternalProgram]
) -> None:
    mark = {"MARK": str(tmp_path / "crashed")}
    program = ExternalProgram([burgers1d, "0.1", "0.05", "2"], state_shapes=SHAPES, environment=mark)
    opened.append(program)
    after = program.step(program.step(velocity(), {}), {})
    wanted = same_in_torch(same_in_torch(velocity()["velocity"], 0.1, 0.05), 0.1, 0.05)
    torch.testing.assert_close(after["velocity"], wanted, rtol=1e-12, atol=1e-12)
    assert (program.statistics.restarts, program.statistics.crashed) == (1, 0)
    assert program.statistics.last_error.endswith("it was ended by SIGABRT: crashing on purpose")


def test_a_program_that_always_crashes_loses_its_batch(burgers1d: str, opened: list[ExternalProgram]) -> None:
    program = ExternalProgram([burgers1d, "0.1", "0.05", "1"], state_shapes=SHAPES, retries=2)
    opened.append(program)
    assert not alive(program.step(velocity(), {})).any()
    assert (program.statistics.restarts, program.statistics.crashed) == (2, 5)


def test_what_diverges_in_the_program_has_diverged(burgers1d: str, opened: list[ExternalProgram]) -> None:
    program = ExternalProgram([burgers1d, "0.1", "0.05"], state_shapes=SHAPES)
    opened.append(program)
    wild = velocity()
    wild["velocity"][3] = torch.linspace(-1e5, 1e5, CELLS)
    assert alive(program.step(wild, {})).tolist() == [True, True, True, False, True]
    assert (program.statistics.diverged, program.statistics.crashed) == (1, 0)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import time; time.sleep(60)", "it did not answer in time"),
        ("import sys; sys.stdin.buffer.read(10); print('hello', flush=True); input()", 'it answered "hello " in place'),
        ("import sys; sys.exit('no licence')", "it ended with exit status 1: no licence"),
        ("print('error mesh too coarse', flush=True); input()", "it says: mesh too coarse"),
        ("print('done 1', flush=True); print('velocity float64 2 1 1', flush=True); input()", "expected, with a type"),
        ("print('done 1', flush=True); print('velocity', flush=True); input()", 'in place of "NAME TYPE AXES'),
        ("print('x' * 10000, flush=True); input()", "a line of more than 4096 bytes"),
        ("import os, time; os.close(1); time.sleep(60)", "it closed its output"),
    ],
)
def test_every_misbehaviour_is_a_crash_with_a_reason(script: str, reason: str) -> None:
    program = ExternalProgram([sys.executable, "-c", script], state_shapes=SHAPES, timeout=2, retries=0)
    assert not alive(program.step(velocity(), {})).any()
    assert reason in program.statistics.last_error
    assert program.statistics.crashed == 5


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers"
    script = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(numbers)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(60)\n"
    )
    program = ExternalProgram([sys.executable, "-c", script], state_shapes=SHAPES, timeout=3, retries=0)
    program.step(velocity(), {})
    deadline = time.monotonic() + 10  # a kill takes effect when the scheduler comes to it
    for number in map(int, numbers.read_text().split()):
        while lives(number):
            assert time.monotonic() < deadline, f"process {number} lives on"
            time.sleep(0.01)


def lives(number: int) -> bool:
    """Zombies do not: the child's own parent is gone, and who inherits it may not collect it."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


FOLDER = """
import os, sys
import numpy as np
question = np.load(sys.argv[1])
assert sorted(os.environ) and "SECRET" not in os.environ
np.savez(sys.argv[2], velocity=question["velocity"] * question["by"][:, None] + float(os.environ["SHIFT"]))
"""


def test_a_program_that_reads_and_writes_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    program = ExternalProgram(
        [sys.executable, "-c", FOLDER],
        state_shapes=SHAPES,
        param_shapes={"by": ()},
        protocol="folder",
        environment={"SHIFT": "0.5"},
    )
    by = torch.arange(5, dtype=torch.float64)
    after = program.step(velocity(), {"by": by})
    torch.testing.assert_close(after["velocity"], velocity()["velocity"] * by[:, None] + 0.5)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("", "it wrote no out.npz"),
        ("raise SystemExit('bad mesh')", "it ended with exit status 1: bad mesh"),
        ("import sys; open(sys.argv[2], 'w').write('nonsense')", "its out.npz cannot be read"),
        ("import sys, numpy; numpy.savez(sys.argv[2], velocity=numpy.zeros(3))", "not as floats of shape (5, 24)"),
        ("import time; time.sleep(60)", "it did not answer in time"),
    ],
)
def test_every_misbehaviour_with_files_is_a_crash(script: str, reason: str) -> None:
    program = ExternalProgram(
        [sys.executable, "-c", script], state_shapes=SHAPES, protocol="folder", timeout=2, retries=0
    )
    assert not alive(program.step(velocity(), {})).any()
    assert reason in program.statistics.last_error


def test_a_corrector_is_trained_through_a_program_that_crashes_once(
    burgers1d: str, tmp_path: Path, opened: list[ExternalProgram]
) -> None:
    """A program with too much viscosity is corrected to one with the right one, and neither shows how it computes."""
    mark = {"MARK": str(tmp_path / "crashed")}
    fine = ExternalProgram([burgers1d, "0.02", "0.1"], state_shapes=SHAPES)
    coarse = ExternalProgram([burgers1d, "0.4", "0.1", "25"], state_shapes=SHAPES, environment=mark)
    opened += [fine, coarse]
    frames = [velocity(1)]
    for _ in range(11):
        frames.append(fine.step(frames[-1], {}))
    case = Case("fine", {"velocity": torch.cat([frame["velocity"] for frame in frames])}, {})

    loop = Loop(coarse, FieldCoupling("velocity"), steps=3)
    corrector = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False).double()
    nn.init.zeros_(corrector.weight)
    source, batch = ZerothOrderLoop(loop, mu=1e-6), Windows(loop, [case]).batch([0, 2, 4, 6, 8])
    optimizer, losses = torch.optim.Adam(corrector.parameters(), lr=0.01), []
    for number in range(80):
        estimate = source.estimate(corrector, Batch.of(number, 0, number, *batch), None)
        corrector.weight.grad = estimate.gradients["weight"]
        optimizer.step()
        losses.append(estimate.loss)
    assert losses[-1] < 0.02 * losses[0]
    assert (coarse.statistics.restarts, coarse.statistics.crashed, coarse.statistics.diverged) == (1, 0, 0)
    # The viscosity that was too much, taken away again: near −0.038 times (1, −2, 1), but for what three steps mix.
    left, centre, right = corrector.weight.detach().flatten().tolist()
    assert left < -0.02 and right < -0.02 and 0.05 < centre < 0.12


def test_a_copy_has_a_process_of_its_own(burgers1d: str, opened: list[ExternalProgram]) -> None:
    program = ExternalProgram([burgers1d, "0.1", "0.05"], state_shapes=SHAPES)
    first = program.step(velocity(), {})
    copy = pickle.loads(pickle.dumps(program))
    opened += [program, copy]
    assert torch.equal(copy.step(velocity(), {})["velocity"], first["velocity"])


@pytest.mark.parametrize(
    ("command", "settings", "sentence"),
    [
        (["/no/such/program"], {}, "the program '/no/such/program' cannot be started: No such file"),
        ("burgers1d 0.1 0.05", {}, "command must be a list"),
        (["true"], {"protocol": "socket"}, "unknown protocol 'socket'"),
        (["true"], {"timeout": 0}, "timeout must be positive"),
        (["true"], {"param_shapes": SHAPES}, "have the same name: velocity"),
    ],
)
def test_what_cannot_work_is_refused(command: object, settings: dict, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        ExternalProgram(command, state_shapes=SHAPES, **settings).step(velocity(), settings.get("none", {}))
