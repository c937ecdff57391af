"""The report of a solver in the loop: errors by method, the share of the way to SOL-FO, fields, the paper's bars."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deepzero_core.errors import WorkError
from tasks import loop_plots, plots
from tasks.loop_order import errors, order_notes
from tasks.loop_plots import LOOP_NAMES, Grouped, in_rows
from tasks.page import Gallery, Page, Table, write_page
from tasks.records import PRETRAINED, Cases, LoopResult, Reported
from tasks.report import SCHEMA_VERSION, duration
from tasks.seeds import by_method, spread

# Mean absolute error over all time steps, unsteady wake flow, ± over test cases: DeepZero (ICLR 2024).
PUBLISHED = {"src": (0.180, 0.022), "non": (0.153, 0.041), "sol-zo": (0.119, 0.038), "sol-fo": (0.074, 0.034)}


def write_loop_report(
    folder: Any,
    *,
    experiment_yaml: str,
    title: str,
    results: Sequence[LoopResult],
    cases: Cases,
    queries_per_step: int,
    reference: Tensor,
    animated: bool,
    environment: Mapping[str, str],
    mlflow_url: str | None,
    notes: Sequence[str] = (),
) -> Reported:
    """Write the report into `folder`; see `tasks.page`. result.json has, beside the page's keys:

        flow        "solver-loop"
        methods     list, the main method first, of {method, seeds, and lists by seed: mae, mae_by_case,
                    relative_error, spectrum_error (or null), share_of_the_way (or null), parameters, queries,
                    solver_steps, diverged, crashed, restarts, test_diverged, steps_per_second, seconds}
        cases       {names, frames}
        order       list of sentences, one for each pair of methods whose errors are not in the paper's order

    Args:
        results: of every method and seed.
        reference: [T, C, …], the image of the first test case.

    Raises:
        RequestError, WorkError: as `write_page`; WorkError without results.
    """
    if not results:
        raise WorkError("a report needs the result of at least one method")
    grouped = by_method(results)
    holds, broken = order_notes(grouped)
    lost = losses(grouped)
    result = {
        "schema_version": SCHEMA_VERSION,
        "flow": "solver-loop",
        "title": title,
        "experiment_yaml": experiment_yaml,
        "methods": [_numbers(grouped, method) for method in grouped],
        "cases": {"names": list(results[0].rolled.cases), "frames": cases.frames},
        "order": broken,
        "data": {
            "name": cases.name,
            "digest": cases.digest,
            "train": cases.counts["train"],
            "test": cases.counts["test"],
            "unit": "cases",
        },
        "environment": dict(environment),
        "mlflow_url": mlflow_url,
        "notes": [*notes, *holds, *broken, *lost],
    }
    page = Page(
        result=result,
        facts=_facts(grouped),
        heading="Error on the test cases",
        table=loop_table(grouped, queries_per_step),
        draw=lambda gallery: _draw(gallery, grouped, reference, animated),
    )
    return write_page(folder, page)


def share_of_the_way(grouped: Grouped, method: str) -> list[float]:
    """By seed: (SRC − MAE) / (SRC − SOL-FO), each seed beside its own SOL-FO; empty where that cannot be said."""
    if not {"src", "sol-fo"} <= set(grouped) or method == "src":
        return []
    (source, *_), firsts = errors(grouped["src"]), errors(grouped["sol-fo"])
    if len(firsts) != len(grouped[method]) or any(first >= source for first in firsts):
        return []
    return [(source - found) / (source - first) for found, first in zip(errors(grouped[method]), firsts, strict=True)]


def loop_table(grouped: Grouped, queries_per_step: int) -> Table:
    """Mean ± standard deviation over the seeds, one row per method."""
    rows = []
    for method, several in in_rows(grouped).items():
        shares = share_of_the_way(grouped, method)
        spectra = [statistics.mean(r.rolled.spectrum_error) for r in several if r.rolled.spectrum_error is not None]
        rows.append(
            (
                LOOP_NAMES[method],
                spread(errors(several), 4),
                spread([100 * statistics.mean(r.rolled.relative_error) for r in several], 1),
                spread(spectra, 2) if spectra else "–",
                spread([100 * share for share in shares], 0) + " %" if shares else "–",
                f"{round(statistics.mean(r.corrected.queries for r in several)):,}",
                f"{round(statistics.mean(r.corrected.solver_steps for r in several)):,}",
                duration(statistics.mean(r.corrected.seconds for r in several)),
            )
        )
    columns = ("method", "MAE", "relative, %", "spectrum", "to SOL-FO", "queries", "solver steps", "training")
    seeds = max(len(several) for several in grouped.values())
    caption = (
        f"Mean ± standard deviation of {seeds} seed{'s' if seeds > 1 else ''} of the mean over all test cases and "
        "frames. Spectrum: mean of |ln E(k)/E_ref(k)|. To SOL-FO: the share of the way from SRC to SOL-FO. Queries: "
        f"evaluations of the loss in training, at most {queries_per_step:,} per step of every zeroth-order method; "
        "solver steps: of one simulation each. Training: without pre-training."
    )
    return Table(columns, tuple(rows), caption)


def losses(grouped: Grouped) -> list[str]:
    """Sentences on simulations that diverged or crashed."""
    found = []
    for method, several in grouped.items():
        trained = [r.corrected for r in several]
        counts = {
            "diverged in training": sum(c.diverged for c in trained),
            "crashed in training": sum(c.crashed for c in trained),
            "restarts of the program": sum(c.restarts for c in trained),
            "test cases diverged": sum(r.rolled.diverged for r in several),
        }
        said = ", ".join(f"{what}: {count:,}" for what, count in counts.items() if count)
        if said:
            found.append(f"{LOOP_NAMES[method]}: {said}.")
    return found


def _facts(grouped: Grouped) -> list[tuple[str, str]]:
    method, several = next(iter(grouped.items()))
    name = LOOP_NAMES[method]
    facts = [(f"{statistics.mean(errors(several)):.4f}", f"mean absolute error of {name} on the test cases")]
    shares = share_of_the_way(grouped, method)
    if shares:
        facts.append((f"{100 * statistics.mean(shares):.0f}%", "of the way from SRC to SOL-FO"))
    speed = statistics.mean(r.rolled.steps_per_second for r in several)
    facts.append((f"{speed:,.0f}", "solver steps per second in the roll-out"))
    facts.append((duration(statistics.mean(r.corrected.seconds for r in several)), "training time"))
    return facts


def _numbers(grouped: Grouped, method: str) -> dict[str, Any]:
    several = grouped[method]
    corrected, rolled = [r.corrected for r in several], [r.rolled for r in several]
    has_spectrum = all(r.spectrum_error is not None for r in rolled)
    return {
        "method": method,
        "seeds": [c.seed for c in corrected],
        "mae": errors(several),
        "mae_by_case": [list(r.mae) for r in rolled],
        "relative_error": [statistics.mean(r.relative_error) for r in rolled],
        "spectrum_error": [statistics.mean(r.spectrum_error or ()) for r in rolled] if has_spectrum else None,
        "share_of_the_way": share_of_the_way(grouped, method) or None,
        "test_diverged": [r.diverged for r in rolled],
        "steps_per_second": [r.steps_per_second for r in rolled],
    } | {
        name: [getattr(c, name) for c in corrected]
        for name in ("parameters", "queries", "solver_steps", "diverged", "crashed", "restarts", "seconds")
    }


def _draw(gallery: Gallery, grouped: Grouped, reference: Tensor, animated: bool) -> None:
    first = next(iter(grouped.values()))[0]
    case = first.rolled.cases[0]
    shown = "the speed |v|" if reference.ndim == 4 and reference.shape[1] == 2 else "the first channel"
    gallery.add(
        "fields.png",
        "Fields",
        f"Test case “{case}”, {shown}: the solver alone, corrected by every method, and the reference; the first seed.",
        lambda path: loop_plots.fields(grouped, reference, path),
    )
    gallery.add(
        "error-over-time.png",
        "Error over time",
        "Mean absolute error, the mean over all seeds; the band is the standard deviation over the test cases.",
        lambda path: loop_plots.error_curves(grouped, path),
    )
    gallery.add(
        "bars.png",
        "Beside the paper",
        "Error over that of the solver alone: here, and as the paper reports it for its wake flow with another network "
        "and far more training. The order and the proportions are what can be compared. Lines: standard deviation over "
        "test cases.",
        lambda path: loop_plots.bars(grouped, PUBLISHED, path),
        _published(grouped),
    )
    if any(several[0].corrected.history for several in grouped.values()):
        gallery.add(
            "training-loss.png",
            "Training",
            "Loss of the batch, a moving average; the first seed. Loops of different length have different losses.",
            lambda path: plots.losses(
                {LOOP_NAMES[name]: some[0].corrected.history for name, some in grouped.items() if name != PRETRAINED},
                path,
                title="Loss in training",
                unit="½ Σ error² in variances",
                columns=5,
                height=4.0,
                logarithmic=True,
            ),
        )
    if animated and reference.ndim == 4:
        gallery.add(
            "animation.gif",
            "Animation",
            f"Test case “{case}”, {shown}; every frame of the roll-out.",
            lambda path: loop_plots.animation(grouped, reference, path),
        )


def _published(grouped: Grouped) -> Table:
    """The paper's numbers beside ours, mean ± standard deviation over test cases."""
    rows = []
    for method, (mean, deviation) in PUBLISHED.items():
        here = "–"
        if method in grouped:
            each = [error for result in grouped[method] for error in result.rolled.mae]
            here = spread(each, 3)
        rows.append((LOOP_NAMES[method], here, f"{mean:.3f}±{deviation:.3f}"))
    return Table(("mean absolute error", "here", "paper, wake flow"), tuple(rows))
