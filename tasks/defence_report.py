"""The report of a defence: certified accuracy by radius and method, beside the paper's, and what it cost."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from deepzero_core.errors import WorkError
from tasks import defence_plots
from tasks.defence_plots import DEFENCE_NAMES, Grouped, Row
from tasks.page import Gallery, Page, Table, write_page
from tasks.plots import losses
from tasks.records import DefenceResult, Prepared, Reported, Victim
from tasks.report import SCHEMA_VERSION, data_of, duration
from tasks.seeds import by_method, spread

ORDER = ("none", "zo-ae-ds", "deepzero", "fo-ds")
"""From the least to the most certified accuracy, as the paper found it."""

# Certified accuracy in per cent at radii 0, .25, .5, .75, σ = .25: DeepZero (ICLR 2024), Zhang et al. (ICLR 2022).
_RADII = (0.0, 0.25, 0.5, 0.75)
PUBLISHED: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "ImageNet-10 (DeepZero)": {
        "fo-ds": (89.33, 81.67, 68.87, 49.80),
        "zo-ae-ds": (63.60, 52.80, 43.13, 32.73),
        "deepzero": (86.02, 76.61, 61.80, 43.05),
    },
    "CIFAR-10 (ZO-AE-DS)": {
        "fo-ds": (71.80, 51.74, 30.22, 11.87),
        "zo-ds": (44.81, 19.16, 5.06, 0.30),
        "zo-ae-ds": (72.23, 54.87, 35.50, 16.37),
    },
}


def write_defence_report(
    folder: Path,
    *,
    experiment_yaml: str,
    title: str,
    results: Sequence[DefenceResult],
    victim: Victim,
    prepared: Prepared,
    queries_per_step: int,
    price_per_thousand: float | None,
    rows: Sequence[Row],
    environment: Mapping[str, str],
    mlflow_url: str | None,
    notes: Sequence[str] = (),
) -> Reported:
    """Write the report of a defence into `folder`; see `tasks.page`. result.json has, beside the page's keys:

        flow             "defend"
        methods          list, the main method first, of {method, seeds, certified_accuracy: {radius: [share by seed]},
                         average_radius, queries, queries_per_step, images_asked, seconds: lists by seed}
        victim           {kind, name, accuracy, images_asked}
        certification    {examples, sigma, alpha, samples, saved}: of all certificates together
        order            list of sentences, one for each place where certified accuracy is not in the paper's order

    Args:
        results: of every method and seed.
        rows: images for the grid.

    Raises:
        RequestError, WorkError: as `write_page`; WorkError without results.
    """
    if not results:
        raise WorkError("a report needs the result of at least one method")
    grouped = by_method(results)
    broken = out_of_order(grouped)
    everything = [result.certified for result in results]
    result = {
        "schema_version": SCHEMA_VERSION,
        "flow": "defend",
        "title": title,
        "experiment_yaml": experiment_yaml,
        "methods": [_numbers(method, several) for method, several in grouped.items()],
        "victim": {
            "kind": victim.kind,
            "name": victim.name,
            "accuracy": victim.accuracy,
            "images_asked": victim.asked,
        },
        "certification": {
            "examples": everything[0].examples,
            "sigma": everything[0].sigma,
            "alpha": everything[0].alpha,
            "samples": sum(c.samples for c in everything),
            "saved": sum(c.saved for c in everything),
        },
        "order": broken,
        "data": data_of(prepared),
        "environment": dict(environment),
        "mlflow_url": mlflow_url,
        "notes": [*notes, *broken],
    }
    page = Page(
        result=result,
        facts=_facts(grouped, victim),
        heading="Certified accuracy",
        table=defence_table(grouped, queries_per_step),
        draw=lambda gallery: _draw(gallery, grouped, price_per_thousand, rows),
    )
    return write_page(folder, page)


def defence_table(grouped: Grouped, queries_per_step: int) -> Table:
    """Mean ± standard deviation over the seeds, one row per method."""
    radii = sorted(next(iter(grouped.values()))[0].certified.accuracy_at)
    rows = tuple(
        (
            DEFENCE_NAMES[method],
            *(spread([100 * r.certified.accuracy_at[radius] for r in several], 1) for radius in radii),
            spread([r.certified.average_radius for r in several], 2),
            f"{round(statistics.mean(r.defended.queries for r in several)):,}",
            f"{statistics.mean(map(_per_step, several)):,.4g}",
            duration(statistics.mean(r.defended.seconds for r in several)),
        )
        for method, several in grouped.items()
    )
    columns = ("method", *(f"r = {radius:g}" for radius in radii), "ACR", "queries", "per step", "training")
    seeds = len(next(iter(grouped.values())))
    caption = (
        f"Certified accuracy in per cent by radius, and average certified radius; mean ± standard deviation of "
        f"{seeds} seed{'s' if seeds > 1 else ''}. Queries: evaluations of the loss on one batch in training; per step: "
        f"what was really spent of {queries_per_step:,}, the budget of every zeroth-order method. Training: without "
        "pre-training."
    )
    return Table(columns, rows, caption)


def out_of_order(grouped: Grouped) -> list[str]:
    """Sentences on every radius and pair of neighbours where certified accuracy is not in the paper's order."""
    methods = [method for method in ORDER if method in grouped]
    found = []
    for lower, upper in pairwise(methods):
        for radius in sorted(grouped[lower][0].certified.accuracy_at):
            low, high = ([100 * r.certified.accuracy_at[radius] for r in grouped[m]] for m in (lower, upper))
            gain = statistics.mean(high) - statistics.mean(low)
            if gain < 0 or (gain == 0 and lower == "none"):
                names = DEFENCE_NAMES[upper], DEFENCE_NAMES[lower]
                found.append(
                    f"At radius {radius:g} {names[0]} ({spread(high, 1)} %) is not above {names[1]} "
                    f"({spread(low, 1)} %)."
                )
    return found


def _facts(grouped: Grouped, victim: Victim) -> list[tuple[str, str]]:
    method, several = next(iter(grouped.items()))
    radius = statistics.mean(r.certified.average_radius for r in several)
    asked = statistics.mean(r.defended.asked for r in several)
    return [
        (f"{radius:.3f}", f"average certified radius of {DEFENCE_NAMES[method]}, σ = {several[0].certified.sigma:g}"),
        (f"{100 * victim.accuracy:.1f}%", "accuracy of the classifier without noise"),
        (f"{asked:,.0f}", "images asked of the classifier in training"),
        (duration(statistics.mean(r.defended.seconds for r in several)), "training time"),
    ]


def _numbers(method: str, several: Sequence[DefenceResult]) -> dict[str, Any]:
    radii = sorted(several[0].certified.accuracy_at)
    return {
        "method": method,
        "seeds": [r.defended.seed for r in several],
        "certified_accuracy": [[radius, [r.certified.accuracy_at[radius] for r in several]] for radius in radii],
        "average_radius": [r.certified.average_radius for r in several],
        "queries": [r.defended.queries for r in several],
        "queries_per_step": [_per_step(r) for r in several],
        "images_asked": [r.defended.asked for r in several],
        "seconds": [r.defended.seconds for r in several],
    }


def _per_step(result: DefenceResult) -> float:
    """Queries really spent; 0 where nothing was trained."""
    return result.defended.queries / max(1, result.defended.steps)


def _draw(gallery: Gallery, grouped: Grouped, price: float | None, rows: Sequence[Row]) -> None:
    seeds = len(next(iter(grouped.values())))
    adaptive = any(result.certified.saved for several in grouped.values() for result in several)
    gallery.add(
        "certified-accuracy.png",
        "Certified accuracy by radius",
        "The share of examples that are answered rightly, and provably so within the radius"
        + (f"; the mean and the range of {seeds} seeds." if seeds > 1 else ".")
        + (" A lower bound between the radii of the table, where examples were settled." if adaptive else ""),
        lambda path: defence_plots.accuracy_curves(grouped, path),
        _published(),
    )
    gallery.add(
        "images.png",
        "What the classifier sees",
        "Test images as they are, with noise, and what every method makes of that; below each the classifier's answer.",
        lambda path: defence_plots.grid(rows, path),
    )
    if any(several[0].defended.history for several in grouped.values()):
        gallery.add(
            "stability-loss.png",
            "Training",
            "Cross-entropy of the classifier's answers to denoised images against its answers to the images as they "
            "are, a moving average; the first seed.",
            lambda path: losses(
                {DEFENCE_NAMES[method]: several[0].defended.history for method, several in grouped.items()},
                path,
                title="Stability loss of the batch",
                unit="cross-entropy (nats)",
                columns=3,
                height=4.4,
            ),
            _costs(grouped, price),
        )


def _published() -> Table:
    """What the papers report, for other data and other classifiers: the order is what can be compared."""
    rows = [
        (f"{DEFENCE_NAMES[method]}, {where}", *(f"{share:.2f}" for share in shares))
        for where, methods in PUBLISHED.items()
        for method, shares in methods.items()
    ]
    return Table(("published, per cent", *(f"r = {radius:g}" for radius in _RADII)), tuple(rows))


def _costs(grouped: Grouped, price: float | None) -> Table:
    """Images asked in training and in certification, and what they cost; means over the seeds."""
    rows = []
    for method, several in grouped.items():
        training = statistics.mean(r.defended.asked for r in several)
        certification = statistics.mean(r.certified.samples for r in several)
        cost = "–" if price is None else f"{(training + certification) / 1000 * price:,.2f}"
        rows.append((DEFENCE_NAMES[method], f"{training:,.0f}", f"{certification:,.0f}", cost))
    return Table(("images asked", "in training", "in certification", "cost"), tuple(rows))
