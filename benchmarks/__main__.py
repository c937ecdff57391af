"""`python -m benchmarks`: one table, ratios against baselines timed in the same run.

Baselines are timed on a sample of coordinates, evenly spaced over every parameter, and scaled by parameter; the engine
is timed whole. Medians over repeats, with the spread between the fastest and the slowest.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines import feature_reuse, no_reuse
from deepzero_core import cge, first_order
from deepzero_core.models import build_model
from deepzero_core.perturb import prepare

MU = 5e-3
SAMPLES = 6
"""Coordinates per parameter on which a baseline is timed."""


@dataclass(frozen=True)
class Row:
    """Times in seconds per full estimate; ratios of the baseline's median to the engine's."""

    case: str
    coordinates: int
    engine: float
    spread: float
    feature_reuse: float
    no_reuse: float
    error: float
    """‖ĝ − ∇l‖/‖∇l‖ of the engine's estimate at μ = 1e-6."""

    @property
    def ratios(self) -> tuple[float, float]:
        return self.feature_reuse / self.engine, self.no_reuse / self.engine


def measure(case: str, depth: int, batch: int, repeats: int) -> Row:
    """The paper's CNN on random 32×32 images, every coordinate."""
    torch.manual_seed(0)
    network = build_model("cnn", in_channels=3, num_classes=10, image_size=32, depth=depth, seed=0)
    assert isinstance(network, nn.Sequential)
    inputs, targets = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    evaluator = prepare(network, inputs, targets, F.cross_entropy)
    cge(network, inputs, targets, F.cross_entropy, evaluator=evaluator, coordinates=_sample(network))
    times = [
        _seconds(lambda: cge(network, inputs, targets, F.cross_entropy, mu=MU, evaluator=evaluator))
        for _ in range(repeats)
    ]
    fine = cge(network, inputs, targets, F.cross_entropy, mu=1e-6, evaluator=evaluator)
    exact = first_order(network, inputs, targets, F.cross_entropy)
    return Row(
        case,
        fine.queries - 1,
        statistics.median(times),
        (max(times) - min(times)) / statistics.median(times),
        _scaled(lambda some: feature_reuse(network, inputs, targets, F.cross_entropy, some, MU), network, repeats),
        _scaled(lambda some: no_reuse(network, inputs, targets, F.cross_entropy, some, MU), network, repeats),
        _relative_error(fine.gradients, exact.gradients),
    )


def _sample(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.linspace(0, parameter.numel() - 1, min(SAMPLES, parameter.numel())).long()
        for name, parameter in network.named_parameters()
    }


def _scaled(run: Callable[[dict[str, Tensor]], object], network: nn.Module, repeats: int) -> float:
    """Median seconds for all coordinates, from the sample's time per coordinate of each parameter."""
    total = 0.0
    for name, indices in _sample(network).items():
        base = statistics.median(_seconds(lambda: run({})) for _ in range(repeats))
        times = [_seconds(lambda name=name, indices=indices: run({name: indices})) for _ in range(repeats)]
        per_coordinate = max(0.0, statistics.median(times) - base) / len(indices)
        total += per_coordinate * network.get_parameter(name).numel()
    return total


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    difference = sum((found[name] - exact[name]).double().square().sum().item() for name in exact)
    return (difference / sum(value.double().square().sum().item() for value in exact.values())) ** 0.5


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="where the numbers go")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(f"CNN {depth} blocks", depth, 128, options.repeats) for depth in (2, 5)]
    table = Table(box=box.SIMPLE_HEAD)
    columns = ("case", "coordinates", "engine", "spread", "feature reuse", "no reuse", "error")
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        reuse, none = row.ratios
        table.add_row(
            row.case,
            f"{row.coordinates:,}",
            f"{row.engine:.2f} s",
            f"{row.spread:.0%}",
            f"{row.feature_reuse:.1f} s ({reuse:.1f}×)",
            f"{row.no_reuse:.1f} s ({none:.1f}×)",
            f"{row.error:.1e}",
        )
    Console().print(table)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": options.repeats,
    }
    result = {"machine": machine, "rows": [asdict(row) | {"ratios": row.ratios} for row in rows]}
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
