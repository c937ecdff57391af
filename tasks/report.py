"""The report of a flow: a page to read, the same as Markdown, and the numbers for machines."""

import base64
import json
import secrets
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from deepzero_core.errors import RequestError, WorkError
from tasks import plots
from tasks.history import read
from tasks.plots import METHOD_NAMES, percent
from tasks.records import Certified, MethodResult, Prepared, Pruned, Reported

SCHEMA_VERSION = 1
_HTML, _MARKDOWN, _RESULT = "report.html", "report.md", "result.json"
_MINUS, _DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A drawn file of the report's folder: `uri` holds its content, `width` is that of its inches in CSS pixels."""

    file: str
    title: str
    caption: str
    uri: str
    width: int
    table: Table | None = None


def write_report(
    folder: Path,
    *,
    experiment_yaml: str,
    title: str,
    results: Sequence[MethodResult],
    pruned: Pruned | None,
    prepared: Prepared,
    certified: Certified | None,
    environment: Mapping[str, str],
    mlflow_url: str | None,
    notes: Sequence[str] = (),
) -> Reported:
    """Write report.html (self-contained), report.md, its pictures and result.json into `folder`, all of them or none.

    An earlier report in the same place is replaced. result.json, keys sorted, accuracies as shares in [0, 1]:

        schema_version   1; a later number when a key changes its meaning or goes
        title, created   created: ISO 8601, UTC
        experiment_yaml  the resolved configuration
        methods          list, the main method first, of {method, sparsity (null: dense), test_accuracy, test_loss,
                         gap_to_first_order (share; null without that baseline), queries, steps, seconds, confusion}
        data             {name, digest, train, test, class_names, image_shape}
        pruning          null, or {method, sparsity, ratios, sizes, coordinates, queries, seconds}
        certification    null, or {examples, accuracy_at: [[radius, share], …], average_radius, abstained, sigma, alpha,
                         samples (of all examples), saved (of them, by adaptive mode), seconds}
        environment      {name: text}
        mlflow_url       address of the run's page, or null
        notes            list of text
        pictures         {name: file in the folder}

    Args:
        folder: where the report shall lie.
        experiment_yaml: the resolved configuration.
        title: heading.
        results: one per method, the main one first.
        pruned: layer-wise ratios, where something was pruned.
        prepared: the data.
        certified: certificates of the main method's network.
        environment: see `tasks.environment`.
        mlflow_url: address of the run's page.
        notes: sentences that a reader should know.

    Raises:
        RequestError: something that is not a report lies in `folder`.
        WorkError: no results, a file that a record names cannot be read, or the disk failed.
    """
    if not results:
        raise WorkError("a report needs the result of at least one method")
    _refuse_foreign(folder)
    staging = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.tmp"
    try:
        staging.mkdir(parents=True)
        pictures = _draw(staging, results, pruned, prepared, certified)
        result = _result(results, pruned, prepared, certified) | {
            "schema_version": SCHEMA_VERSION,
            "title": title,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "experiment_yaml": experiment_yaml,
            "environment": dict(environment),
            "mlflow_url": mlflow_url,
            "notes": list(notes),
            "pictures": {Path(picture.file).stem: picture.file for picture in pictures},
        }
        facts, table = _facts(results, certified), methods_table(result["methods"])
        (staging / _RESULT).write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (staging / _MARKDOWN).write_text(_markdown(result, facts, table, pictures), encoding="utf-8")
        (staging / _HTML).write_text(_html(result, facts, table, pictures), encoding="utf-8")
        _install(staging, folder)
    except OSError as error:
        raise WorkError(f"the report {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Reported(folder=folder, html=folder / _HTML, markdown=folder / _MARKDOWN, result=folder / _RESULT)


def methods_table(methods: Sequence[Mapping[str, Any]]) -> Table:
    """What the methods reached and what it cost, one row each; `methods` as in result.json."""
    rows = tuple(
        (
            METHOD_NAMES.get(method["method"], method["method"]),
            _DASH if method["sparsity"] is None else percent(method["sparsity"]),
            f"{100 * method['test_accuracy']:.2f}%",
            _DASH if method["gap_to_first_order"] is None else _signed(100 * method["gap_to_first_order"]),
            f"{method['queries']:,}",
            f"{method['steps']:,}",
            duration(method["seconds"]),
        )
        for method in methods
    )
    columns = ("method", "sparsity", "accuracy", "gap", "queries", "steps", "time")
    caption = (
        "Accuracy: on the test data. Gap: percentage points above (+) or below (−) dense first-order training. "
        "Queries: evaluations of the loss on one batch; a backpropagation counts as one. Time: training only."
    )
    return Table(columns, rows, caption)


def gap_to_first_order(result: MethodResult, results: Sequence[MethodResult]) -> float | None:
    """Accuracy beyond that of dense first-order training, as a share; None without that baseline, and for itself."""
    dense = [other for other in results if other.method == "first-order"]
    if not dense or result.method == "first-order":
        return None
    return result.evaluated.accuracy - dense[0].evaluated.accuracy


def duration(seconds: float) -> str:
    """30 ms, 4.2 s, 3 min 05 s, 2 h 10 min."""
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", _MINUS)


def _facts(results: Sequence[MethodResult], certified: Certified | None) -> list[tuple[str, str]]:
    """The few numbers to be read first."""
    main = results[0]
    gap = gap_to_first_order(main, results)
    facts = [(f"{100 * main.evaluated.accuracy:.2f}%", f"test accuracy of {plots.method_name(main)}")]
    if gap is not None:
        facts.append((_signed(100 * gap), "points against first order"))
    facts.append((f"{main.trained.queries:,}", f"queries in {main.trained.steps:,} steps"))
    facts.append((duration(main.trained.seconds), "training time"))
    if certified is not None:
        facts.append((f"{certified.average_radius:.3f}", f"average certified radius, σ = {certified.sigma:g}"))
    return facts


def _draw(
    folder: Path,
    results: Sequence[MethodResult],
    pruned: Pruned | None,
    prepared: Prepared,
    certified: Certified | None,
) -> list[Picture]:
    main = results[0]
    pictures: list[Picture] = []

    def add(file: str, title: str, caption: str, draw: Callable[[Path], None], table: Table | None = None) -> None:
        draw(folder / file)
        content = (folder / file).read_bytes()
        uri = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
        pixels = int.from_bytes(content[16:20], "big")  # width field of a PNG's header
        pictures.append(Picture(file, title, caption, uri, round(96 * pixels / plots.DPI), table))

    add(
        "learning-curves.png",
        "Learning curves",
        "Training loss, a moving average over one fortieth of the steps, and accuracy on the test images.",
        lambda path: plots.learning_curves(results, path),
    )
    exact = next((other for other in results if other.method == "first-order-sparse-gradients"), None)
    if main.method == "cge" and exact is not None:
        add(
            "loss-overlay.png",
            "Estimated against exact gradients",
            "The same masks and batches: what finite differences cost in comparison with backpropagation.",
            lambda path: plots.loss_overlay(main, exact, path),
        )
    add(
        "accuracy-against-queries.png",
        "Accuracy against queries",
        "What an accuracy costs in evaluations of the loss; a backpropagation counts as one.",
        lambda path: plots.accuracy_against_queries(results, path),
        _speed_table(results),
    )
    if pruned is not None and pruned.ratios:
        add(
            "layer-ratios.png",
            "Layer-wise ratios",
            f"A step estimates {pruned.coordinates:,} of {sum(pruned.sizes.values()):,} coordinates; biases and "
            "normalisation parameters are always among them. The layers' shares stay, the weights are drawn anew.",
            lambda path: plots.layer_ratios(pruned, path),
        )
    add(
        "confusion-matrix.png",
        "Confusion matrix",
        f"Answers of {plots.method_name(main)} on the test images. Colour: share of the true class.",
        lambda path: plots.confusion_matrix(main.evaluated, prepared.class_names, path),
    )
    if certified is not None:
        radii = sorted(certified.accuracy_at)
        add(
            "certified-accuracy.png",
            "Certified accuracy",
            f"Randomised smoothing, {round(certified.samples / certified.examples):,} samples per example"
            f"{_saved(certified)}, each certificate right with probability {percent(1 - certified.alpha)}; "
            f"{certified.abstained:,} of {certified.examples:,} examples abstained.",
            lambda path: plots.certified_accuracy(certified, path),
            Table(
                ("radius", *(f"{radius:g}" for radius in radii)),
                (("certified accuracy", *(f"{100 * certified.accuracy_at[radius]:.1f}%" for radius in radii)),),
            ),
        )
    return pictures


def _saved(certified: Certified) -> str:
    """What adaptive mode did, in words; it stops before the radius of an example has become as large as it can."""
    if not certified.saved:
        return ""
    return (
        f" on average, {certified.share_saved:.0%} of them saved by stopping where the reported radii were decided "
        "(between those, and in the average radius, this shows less than all samples would)"
    )


def _speed_table(results: Sequence[MethodResult]) -> Table | None:
    """What a step of coordinate-wise estimation took, beside the cost model's prediction; medians."""
    rows = []
    for result in results:
        lines = [line for line in read(result.trained.history) if "share_of_peak" in line]
        if lines:
            middle = {name: statistics.median(line[name] for line in lines) for name in _SPEED}
            rows.append(
                (
                    plots.method_name(result),
                    duration(middle["step_seconds"]),
                    duration(middle["predicted_seconds"]),
                    percent(round(middle["share_of_peak"], 2)),
                )
            )
    return Table(("method", "time per step", "predicted", "share of peak"), tuple(rows)) if rows else None


_SPEED = ("step_seconds", "predicted_seconds", "share_of_peak")


def _result(
    results: Sequence[MethodResult], pruned: Pruned | None, prepared: Prepared, certified: Certified | None
) -> dict[str, Any]:
    methods = [
        {
            "method": result.method,
            "sparsity": result.sparsity,
            "test_accuracy": result.evaluated.accuracy,
            "test_loss": result.evaluated.loss,
            "gap_to_first_order": gap_to_first_order(result, results),
            "queries": result.trained.queries,
            "steps": result.trained.steps,
            "seconds": result.trained.seconds,
            "confusion": result.evaluated.confusion,
        }
        for result in results
    ]
    certification = None if certified is None else certified.model_dump(mode="json", exclude={"table", "accuracy_at"})
    if certified is not None and certification is not None:
        # Pairs: JSON would make text of the radii.
        certification["accuracy_at"] = sorted(certified.accuracy_at.items())
    return {
        "methods": methods,
        "data": {
            "name": prepared.name,
            "digest": prepared.digest,
            "train": prepared.counts.get("train", 0),
            "test": prepared.counts.get("test", 0),
            "class_names": prepared.class_names,
            "image_shape": prepared.image_shape,
        },
        "pruning": None if pruned is None else pruned.model_dump(mode="json", exclude={"folder"}),
        "certification": certification,
    }


def _html(result: dict[str, Any], facts: list[tuple[str, str]], table: Table, pictures: Sequence[Picture]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tasks", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    url = result["mlflow_url"]
    # Escaping does not make javascript: harmless.
    link = url if url and url.startswith(("http://", "https://")) else None
    return environment.get_template("report.html.j2").render(
        result=result, date=_date(result), facts=facts, table=table, pictures=pictures, mlflow_url=link
    )


def _markdown(result: dict[str, Any], facts: list[tuple[str, str]], table: Table, pictures: Sequence[Picture]) -> str:
    data = result["data"]
    parts = [
        f"# {_plain(result['title'])}",
        f"{_date(result)} · {_plain(data['name'])}, {data['train']:,} training and {data['test']:,} test images"
        + (f" · [MLflow run](<{result['mlflow_url']}>)" if result["mlflow_url"] else ""),
        " · ".join(f"**{value}** {label}" for value, label in facts),
        "## Methods",
        _markdown_table(table),
        table.caption,
    ]
    for picture in pictures:
        parts += [f"## {picture.title}", f"![{picture.title}]({picture.file})", _plain(picture.caption)]
        parts += [_markdown_table(picture.table)] if picture.table else []
    if result["notes"]:
        parts += ["## Notes", "\n".join(f"- {_plain(note)}" for note in result["notes"])]
    environment = [f"- {name}: {_plain(value)}" for name, value in result["environment"].items()]
    parts += ["## Configuration", f"````yaml\n{result['experiment_yaml'].strip()}\n````"]
    parts += ["## Environment", "\n".join(environment)]
    return "\n\n".join(parts) + "\n"


def _date(result: Mapping[str, Any]) -> str:
    return f"{datetime.fromisoformat(result['created']):%d %B %Y, %H:%M} UTC".lstrip("0")


def _markdown_table(table: Table) -> str:
    rule = "|".join(("---", *("---:" for _ in table.columns[1:])))
    lines = [" | ".join(map(_plain, row)) for row in (table.columns, *table.rows)]
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _plain(text: str) -> str:
    """Text on one line in which Markdown sees no table, link or tag."""
    escaped = "".join(f"\\{character}" if character in "\\|`*_<>[]" else character for character in text)
    return " ".join(escaped.split())


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _RESULT).is_file():
        raise RequestError(f"{folder} holds files that are not a report's; move them or name another folder")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} must be a folder for the report, but is a file")


def _install(staging: Path, folder: Path) -> None:
    retired = staging.with_suffix(".old.tmp")
    if folder.exists():
        folder.rename(retired)
    try:
        staging.rename(folder)
    except OSError:
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)
