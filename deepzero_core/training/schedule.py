"""Learning rate over the steps of a run."""

import math
from dataclasses import dataclass

from deepzero_core.errors import RequestError, suggest

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up, then a cosine to zero or a constant.

        warm-up, step t < w:   lr · (t + 1)/w
        cosine, step t ≥ w:    lr · ½(1 + cos(π (t − w)/(T − w)))

    Source: Loshchilov and Hutter 2017, without restarts; warm-up as in Goyal et al. 2017.

    Raises:
        RequestError: unknown name, or a warm-up that does not end before the run does.
    """

    peak: float
    steps: int
    warmup_steps: int = 0
    name: str = "cosine"

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise RequestError(f"unknown schedule {self.name!r}: {suggest(self.name, SCHEDULES)}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise RequestError(f"a warm-up of {self.warmup_steps} steps does not fit a run of {self.steps} steps")

    def at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.name == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
