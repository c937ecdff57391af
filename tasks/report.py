"""The report of training a classifier, and of certifying it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepzero_core.errors import WorkError
from tasks import plots
from tasks.history import read
from tasks.page import Page, Table, write_page
from tasks.plots import METHOD_NAMES, percent
from tasks.records import Certified, MethodResult, Prepared, Pruned, Reported

SCHEMA_VERSION = 1
_MINUS, _DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


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
        table            {columns, rows}: the closing table, as text
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
    result = _result(results, pruned, prepared, certified) | {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "experiment_yaml": experiment_yaml,
        "environment": dict(environment),
        "mlflow_url": mlflow_url,
        "notes": list(notes),
    }
    return write_page(
        folder,
        Page(
            result=result,
            facts=_facts(results, certified),
            heading="Methods",
            table=methods_table(result["methods"]),
            draw=lambda gallery: _draw(gallery.add, results, pruned, prepared, certified),
        ),
    )


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
    add: Callable[..., None],
    results: Sequence[MethodResult],
    pruned: Pruned | None,
    prepared: Prepared,
    certified: Certified | None,
) -> None:
    main = results[0]
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
        "data": data_of(prepared),
        "pruning": None if pruned is None else pruned.model_dump(mode="json", exclude={"folder"}),
        "certification": certification,
    }


def data_of(prepared: Prepared) -> dict[str, Any]:
    """What a report says of its data."""
    return {
        "name": prepared.name,
        "digest": prepared.digest,
        "train": prepared.counts.get("train", 0),
        "test": prepared.counts.get("test", 0),
        "class_names": prepared.class_names,
        "image_shape": prepared.image_shape,
    }
