"""Rows of the table, and the file that keeps them.

{"machine": {…}, "rows": [Row, …]}      written after every row: a run that is stopped keeps what it measured
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from benchmarks.bars import SPEED
from benchmarks.timing import Timing

AGREEMENT = 2e-2
"""Relative error up to which an estimate agrees with float64; beyond, as long as it is not worse than the paper's."""


@dataclass(frozen=True)
class Row:
    """One case at one precision.

    error, paper_error    ‖ĝ − ĝ₆₄‖/‖ĝ₆₄‖ on a sample of coordinates, ĝ₆₄ the paper's scheme in float64, ĝ the engine's
                          estimate and the paper's scheme in float32; None where there is nothing to compare with
    flops                 floating-point operations that feature reuse spends on an estimate; None where not counted
    peak                  of the machine, per second, measured beside this row
    """

    case: str
    about: str
    precision: str
    device: str
    coordinates: int
    engine: Timing
    baselines: dict[str, Timing]
    error: float | None = None
    paper_error: float | None = None
    flops: int | None = None
    peak: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def ratios(self) -> dict[str, float]:
        """How many times longer each baseline takes, by the medians."""
        return {name: timing.median / self.engine.median for name, timing in self.baselines.items()}

    @property
    def verdicts(self) -> dict[str, str]:
        """The bars of this case, by baseline."""
        bars = {name: SPEED.get((self.case, name, self.device)) for name in self.baselines}
        return {name: bar.verdict(self.ratios[name]) for name, bar in bars.items() if bar}

    @property
    def effective(self) -> float | None:
        """Feature reuse's floating-point operations per second of the engine's time."""
        return None if self.flops is None else self.flops / self.engine.median

    @property
    def share_of_peak(self) -> float | None:
        return None if self.effective is None or self.peak is None else self.effective / self.peak

    @property
    def agrees(self) -> bool:
        return self.error is None or self.error <= max(AGREEMENT, self.paper_error or 0.0)

    def document(self) -> dict[str, Any]:
        """Everything above as JSON's types."""
        derived = ("ratios", "verdicts", "effective", "share_of_peak", "agrees")
        timings = {"engine": self.engine, **self.baselines}
        medians = {name: {"median": timing.median, "spread": timing.spread} for name, timing in timings.items()}
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived} | {"summary": medians}


def save(path: Path, document: Any) -> None:
    """Write JSON so that the file is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=path.parent, prefix=path.name, encoding="utf-8", delete=False) as file:
        file.write(json.dumps(document, indent=1) + "\n")
    Path(file.name).replace(path)
