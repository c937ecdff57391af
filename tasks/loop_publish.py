"""Stage: write the report of a solver in the loop, and give run, corrector and report to MLflow and Prefect."""

import statistics
import time

from prefect import task

import configs
from configs.solver_loop import SolverLoop
from deepzero_core.errors import WorkError
from infra.home import home
from tasks.couple import corrector_after
from tasks.environment import environment
from tasks.loop_order import errors
from tasks.loop_problem import Setting, open_simulator, reference_images
from tasks.loop_report import share_of_the_way, write_loop_report
from tasks.present import present
from tasks.progress import concluded
from tasks.records import Cases, LoopResult, Reported
from tasks.seeds import by_method
from tasks.stage import Tracking
from tasks.tracking import Run, run_url


@task(name="report")
def report_loop(tracking: Tracking, loop: SolverLoop, cases: Cases, results: list[LoopResult]) -> Reported:
    """The report of a flow run; the first result is the experiment's own method: its corrector is logged as a model."""
    started = time.monotonic()
    run = Run.resume(tracking.run_id)
    notes = []
    with open_simulator(loop) as simulator:
        setting = Setting(loop, cases, simulator)
        reference = reference_images(setting.coupling, setting.test[:1], loop.rollout.frames)[:, 0]
        main = results[0].corrected
        if main.weights is not None:
            try:
                corrector = corrector_after(setting, main.seed, main).float()
                run.model(corrector, setting.features().float(), "corrector")
            except WorkError as error:
                notes.append(f"The corrector could not be logged as a model: {error}")
    reported = write_loop_report(
        home() / "reports" / tracking.run_id,
        experiment_yaml=configs.dump(loop),
        title=loop.name,
        results=results,
        cases=cases,
        queries_per_step=loop.training.queries,
        reference=reference,
        animated=loop.rollout.animation,
        environment=environment(),
        mlflow_url=run_url(tracking.experiment_id, tracking.run_id),
        notes=notes,
    )
    present(
        run,
        reported,
        title=loop.name,
        data=(cases.name, cases.digest, cases.counts),
        summary=_summary(results),
        head_ends_at="Fields",
    )
    concluded("report", time.monotonic() - started)
    return reported


def _summary(results: list[LoopResult]) -> dict[str, float]:
    """What a list of runs is sorted by in MLflow: means over the seeds, the main method plain, the others by name."""
    values: dict[str, float] = {}
    grouped = by_method(results)
    for number, (method, several) in enumerate(grouped.items()):
        prefix = "" if number == 0 else f"baseline/{method}/"
        cases = [error for result in several for error in result.rolled.mae]
        values[f"{prefix}test/mae_mean"] = statistics.mean(errors(several))
        if len(cases) > 1 and max(cases) < float("inf"):
            values[f"{prefix}test/mae_std"] = statistics.stdev(cases)
        relative = [statistics.mean(result.rolled.relative_error) for result in several]
        values[f"{prefix}test/relative_error_mean"] = statistics.mean(relative)
        spectra = [result.rolled.spectrum_error for result in several if result.rolled.spectrum_error is not None]
        if spectra:
            values[f"{prefix}test/spectrum_error_mean"] = statistics.mean(statistics.mean(each) for each in spectra)
        if shares := share_of_the_way(grouped, method):
            values[f"{prefix}test/share_of_the_way"] = statistics.mean(shares)
        values[f"{prefix}test/diverged"] = sum(result.rolled.diverged for result in several)
        for name in ("queries", "solver_steps", "diverged", "crashed", "restarts", "seconds"):
            each = [getattr(result.corrected, name) for result in several]
            values[f"{prefix}cost/{name}"] = sum(each) / len(each)
    speeds = [result.rolled.steps_per_second for result in results]
    return values | {"simulator/steps_per_second": statistics.mean(speeds)}
