"""The schema of a study: one flow, run for every point of a grid of settings and for several seeds."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from configs.schema import Name, Section, Seed, Text
from deepzero_core.errors import RequestError

StudiedFlow = Literal["classify", "pipeline", "defend", "solver-loop"]

MAX_RUNS = 1000
_SEEDED_ONCE = ("classify", "pipeline")  # the others take a list of seeds


@dataclass(frozen=True)
class Point:
    """One run of a study. values: what is varied, by dotted key; experiment: in the schema of the study's flow."""

    values: dict[str, Any]
    seed: int
    experiment: Any

    @property
    def label(self) -> str:
        """The values, without the seed."""
        return ", ".join(f"{key}={value}" for key, value in self.values.items()) or "as it is"


class Study(Section):
    """A flow, what is varied, and how often each is repeated."""

    name: Name = "study"
    """Name of the experiment in MLflow and in file names."""
    flow: StudiedFlow = "classify"
    """The flow that is run for every point."""
    base: Text | dict[str, JsonValue] = "smoke"
    """What all points have in common: a preset of the flow, a YAML file, or the settings themselves."""
    vary: dict[Text, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """By dotted key, the values to try, such as training.method: [cge, rge]; every combination is a point."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Every point is run once for each; the table has means and standard deviations over them."""
    measures: tuple[Text, ...] = ()
    """Metrics of the flow's MLflow run that the table shows; those that the flow is about where this is left out."""

    def points(self, seeds: tuple[int, ...] | None = None) -> Iterator[Point]:
        """Every combination of the varied values, in their order, with every seed.

        Raises:
            RequestError: one of them is no valid experiment.
        """
        from configs.loading import resolve  # it reads this very class

        for combination in itertools.product(*self.vary.values()):
            values = dict(zip(self.vary, combination, strict=True))
            for seed in self.seeds if seeds is None else seeds:
                seeding = {"seed": seed} if self.flow in _SEEDED_ONCE else {"seeds": [seed]}
                # Runs are shown below their parent in MLflow only where they are of the same experiment.
                given = {**values, **seeding, "name": self.name}
                yield Point(values, seed, resolve(self.base, given, flow=self.flow))

    @model_validator(mode="before")
    @classmethod
    def _a_file_travels_by_its_content(cls, data: Any) -> Any:
        # Whoever runs the study may be another machine, or the same one tomorrow.
        from configs.loading import mapping_of

        base = data.get("base") if isinstance(data, dict) else None
        if isinstance(base, str) and (Path(base).suffix in (".yaml", ".yml") or Path(base).is_file()):
            return {**data, "base": mapping_of(base)}
        return data

    @model_validator(mode="after")
    def _every_point_is_possible(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise RequestError("seeds: a seed stands there twice")
        if fixed := {"seed", "seeds", "name"} & set(self.vary):
            raise RequestError(f"vary.{min(fixed)}: the study has a key for it: seeds, name")
        count = math.prod(len(values) for values in self.vary.values()) * len(self.seeds)
        if count > MAX_RUNS:
            raise RequestError(f"vary: {count:,} runs are more than the {MAX_RUNS:,} that a study may have")
        for _ in self.points(self.seeds[:1]):
            pass
        return self
