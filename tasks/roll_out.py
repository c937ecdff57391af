"""Stage: simulate the test cases with a trained corrector, and measure how far they are from their reference."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from prefect.states import State
from torch import Tensor

from configs.solver_loop import SolverLoop
from deepzero_core.data.files import write_arrow
from simulators import methods
from simulators.measures import mean_absolute_error, relative_error, spectrum_error
from tasks.couple import corrector_after
from tasks.loop_problem import Setting, lowest_reynolds, reference_images
from tasks.records import Cases, Corrected, RolledOut
from tasks.solver import open_solver
from tasks.stage import Stage, Tracking, perform, stage_task

MEASURES = ("mae", "relative_error", "spectrum_error")


@stage_task("roll out")
def roll_out(tracking: Tracking, loop: SolverLoop, cases: Cases, corrected: Corrected) -> State[RolledOut] | RolledOut:
    """All test cases advanced together, from their first frame on."""
    inputs = {
        "cases": cases.digest,
        "corrector": loop.corrector if corrected.weights else None,
        "weights": corrected.weights_digest,
        "reynolds": lowest_reynolds(loop) if loop.simulator.kind == "wake" else None,
        "frames": loop.rollout.frames,
        "threads": loop.training.threads,
    }
    label = corrected.method if corrected.weights is None else f"{corrected.method}, seed {corrected.seed}"
    return perform(
        tracking, "roll-out", RolledOut, inputs, lambda stage: _roll_out(stage, loop, cases, corrected), label=label
    )


def _roll_out(stage: Stage, loop: SolverLoop, cases: Cases, corrected: Corrected) -> RolledOut:
    torch.set_num_threads(loop.training.threads)
    started = time.perf_counter()
    frames = loop.rollout.frames
    with open_solver(loop) as simulator:
        setting = Setting(loop, cases, simulator)
        corrector = None if corrected.weights is None else corrector_after(setting, corrected.seed, corrected).eval()
        images = methods.roll_out(simulator, setting.coupling, corrector, setting.test, frames)
        speed = simulator.statistics.steps_per_second
    reference = reference_images(setting.coupling, setting.test, frames)
    errors = errors_of(images, reference)
    names = [case.name for case in setting.test]
    table = _write_table(stage.folder / "errors.parquet", names, errors)
    pictures = stage.folder / "images.arrow"
    write_images(pictures, images[:, 0])
    stage.run.artifact(table, "roll-out")
    means = {name: _means(values) for name, values in errors.items()}
    diverged = int((~errors["mae"][-1].isfinite()).sum())
    for number, error in enumerate(errors["mae"].nanmean(1).tolist()):
        if error == error:  # not NaN: there is a case that lives
            stage.run.metrics({"test/mae": error}, step=number + 1)
    _summarise(stage, means, diverged, speed)
    return RolledOut(
        table=table,
        images=pictures,
        cases=tuple(names),
        mae=means["mae"],
        relative_error=means["relative_error"],
        spectrum_error=means.get("spectrum_error"),
        diverged=diverged,
        steps_per_second=speed,
        seconds=time.perf_counter() - started,
    )


def errors_of(images: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """By measure, [T, N]; NaN from a divergence on. Spectra are of fields in the plane."""
    flat, wanted = (values.flatten(2)[..., None, None] for values in (images, reference))
    errors = {"mae": mean_absolute_error(flat, wanted), "relative_error": relative_error(flat, wanted)}
    if images.ndim == 5:
        errors["spectrum_error"] = torch.where(
            errors["mae"].isfinite(), spectrum_error(images.nan_to_num(), reference), torch.nan
        )
    return errors


def write_images(path: Path, images: Tensor) -> None:
    """[T, C, …] float as an Arrow file with a row per frame."""
    flat = images.flatten(1).float().contiguous()
    values = pa.array(flat.numpy().reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, flat.shape[1])
    schema = pa.schema(
        [pa.field("image", column.type)], metadata={"shape": ",".join(str(length) for length in images.shape)}
    )
    write_arrow(path, pa.record_batch([column], schema=schema))


def read_images(path: Path) -> Tensor:
    """What `write_images` wrote."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        shape = [int(length) for length in reader.schema.metadata[b"shape"].decode().split(",")]
        values = reader.get_batch(0).column("image").flatten().to_numpy(zero_copy_only=True)
        return torch.from_numpy(values.copy()).view(shape)


def _write_table(path: Path, names: list[str], errors: dict[str, Tensor]) -> Path:
    frames = len(errors["mae"])
    columns = {
        "case": [name for name in names for _ in range(frames)],
        "frame": [*range(1, frames + 1)] * len(names),
    }
    measured = {name: pa.array(values.T.flatten().numpy(), from_pandas=True) for name, values in errors.items()}
    pq.write_table(pa.table(columns | measured), path)
    return path


def _means(values: Tensor) -> tuple[float, ...]:
    """By case, over the frames before its divergence; infinite where there is none."""
    return tuple(torch.where(values.isfinite().any(0), values.nanmean(0), torch.inf).tolist())


def _summarise(stage: Stage, means: dict[str, tuple[float, ...]], diverged: int, speed: float) -> None:
    summary = {"test/diverged": float(diverged), "simulator/steps_per_second": speed}
    for name, values in means.items():
        each = torch.tensor(values, dtype=torch.float64)
        summary |= {f"test/{name}_mean": float(each.mean())}
        if len(values) > 1:
            summary |= {f"test/{name}_std": float(each.std())}
    stage.summarise(**summary)
