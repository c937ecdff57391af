"""The report of a study: one row per point, the mean and standard deviation over its seeds; every run in two files."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather

from configs.study import Study
from deepzero_core.errors import WorkError
from tasks.page import Gallery, Page, Table, write_page
from tasks.records import Outcome, Reported
from tasks.report import duration
from tasks.study_plots import measure_by_point, values_of

SCHEMA_VERSION = 1
CSV, ARROW = "study.csv", "study.arrow"

# What a flow is about, where the study names no measures; metrics that a run does not have are left out.
_MEASURES = {
    "classify": ("test/accuracy", "test/loss", "cost/queries"),
    "pipeline": ("test/accuracy", "certified_accuracy/average_radius", "cost/queries"),
    "defend": ("certified_accuracy/radius_0", "certified_accuracy/average_radius", "cost/queries"),
    "solver-loop": ("test/mae_mean", "test/share_of_the_way", "cost/solver_steps"),
}


def write_study_report(
    folder: Path,
    *,
    study: Study,
    experiment_yaml: str,
    outcomes: Sequence[Outcome],
    environment: Mapping[str, str],
    mlflow_url: str | None,
) -> Reported:
    """Write the report, study.csv and study.arrow (a row per run) into `folder`, all of them or none.

    result.json has, beside what `tasks.page` says: flow; failed, the number of runs; runs, a list of {values, seed,
    metrics, seconds, run_id, report, error}, of which those that failed have error only.

    Raises:
        WorkError: no run came to anything, or none has a measure that the study names.
    """
    done = [outcome for outcome in outcomes if outcome.studied is not None]
    if not done:
        raise WorkError(f"no run of the study came to anything; the first failed with: {outcomes[0].error}")
    measures = measures_of(study, done)
    failed = [f"{_label(outcome)}, seed {outcome.seed}: {outcome.error}" for outcome in outcomes if outcome.error]
    result = {
        "schema_version": SCHEMA_VERSION,
        "flow": "study",
        "title": study.name,
        "experiment_yaml": experiment_yaml,
        "failed": len(failed),
        "runs": [_run(outcome) for outcome in outcomes],
        "data": None,
        "environment": dict(environment),
        "mlflow_url": mlflow_url,
        "notes": [f"failed: {sentence}" for sentence in failed],
    }
    seconds = sum(outcome.studied.seconds for outcome in done if outcome.studied)
    facts = [
        (f"{len(by_point(outcomes)):,}", "points"),
        (f"{len(done):,} of {len(outcomes):,}", f"runs of {study.flow}"),
        (duration(seconds), "in all"),
    ]

    def draw(gallery: Gallery) -> None:
        _write_tables(gallery.folder, outcomes)
        for measure in measures:
            gallery.add(
                f"{measure.replace('/', '-').replace('_', '-')}.png",
                measure,
                f"Mean and standard deviation over the seeds; dots: single runs. All numbers: {CSV}, {ARROW}.",
                lambda path, measure=measure: measure_by_point(by_point(done), study.vary, measure, path),  # type: ignore[misc]
            )

    return write_page(
        folder, Page(result=result, facts=facts, heading="Points", table=_table(study, outcomes, measures), draw=draw)
    )


def measures_of(study: Study, done: Sequence[Outcome]) -> tuple[str, ...]:
    """The metrics to be shown. WorkError for one that no run has."""
    known = {name for outcome in done if outcome.studied for name in outcome.studied.metrics}
    if missing := [name for name in study.measures if name not in known]:
        raise WorkError(f"measures: no run has the metric {missing[0]!r}; there are {', '.join(sorted(known))}")
    return study.measures or tuple(name for name in _MEASURES[study.flow] if name in known)


def by_point(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The runs of every point by its values as text, in the order of the study."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(_label(outcome), []).append(outcome)
    return found


def _table(study: Study, outcomes: Sequence[Outcome], measures: Sequence[str]) -> Table:
    rows = tuple(
        (
            *(_text(several[0].values[key]) for key in study.vary),
            _runs(several),
            *(_spread(values_of(several, measure)) for measure in measures),
        )
        for several in by_point(outcomes).values()
    )
    caption = f"Mean ± standard deviation over the runs that were done; seeds {', '.join(map(str, study.seeds))}."
    return Table((*_short(study.vary, "."), "runs", *_short(measures, "/")), rows, caption)


def _runs(several: Sequence[Outcome]) -> str:
    done = sum(outcome.studied is not None for outcome in several)
    return str(done) if done == len(several) else f"{done} of {len(several)}"


def _short(names: Iterable[str], separator: str) -> list[str]:
    """The last part of every dotted name, where that tells them apart."""
    whole = list(names)
    parts = [name.rpartition(separator)[2] for name in whole]
    return [part if parts.count(part) == 1 else name for part, name in zip(parts, whole, strict=True)]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "\N{EN DASH}"
    mean = (
        f"{statistics.mean(values):.4g}" if abs(statistics.mean(values)) < 10_000 else f"{statistics.mean(values):,.0f}"
    )
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _label(outcome: Outcome) -> str:
    return ", ".join(f"{key}={_text(value)}" for key, value in outcome.values.items()) or "as it is"


def _run(outcome: Outcome) -> dict[str, Any]:
    studied = {} if outcome.studied is None else outcome.studied.model_dump(mode="json")
    return {"values": outcome.values, "seed": outcome.seed, "error": outcome.error or None, **studied}


def _write_tables(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """A row per run: what was varied, seed, error, seconds, MLflow run, metrics."""
    done = [outcome.studied for outcome in outcomes]
    columns: dict[str, Any] = {
        **{key: _column([outcome.values[key] for outcome in outcomes]) for key in outcomes[0].values},
        "seed": pa.array([outcome.seed for outcome in outcomes]),
        "error": pa.array([outcome.error or None for outcome in outcomes], pa.string()),
        "seconds": pa.array([studied and studied.seconds for studied in done], pa.float64()),
        "run_id": pa.array([studied and studied.run_id for studied in done], pa.string()),
    }
    for name in sorted({name for studied in done if studied for name in studied.metrics}):
        columns[name] = pa.array([studied and studied.metrics.get(name) for studied in done], pa.float64())
    table = pa.table(columns)
    pyarrow.csv.write_csv(table, folder / CSV)
    pyarrow.feather.write_feather(table, folder / ARROW, compression="uncompressed")


def _column(values: Sequence[Any]) -> "pa.Array":
    """Numbers as numbers, text as text; anything else, and a mixture, as JSON."""
    try:
        if not any(isinstance(value, dict | list) for value in values):
            return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pass  # numbers beside text
    return pa.array([json.dumps(value) for value in values])
