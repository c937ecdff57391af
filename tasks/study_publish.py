"""Stage: write the report of a study and give it to MLflow and Prefect."""

import time

from prefect import task

import configs
from configs.study import Study
from infra.home import home
from tasks.environment import environment
from tasks.present import present
from tasks.progress import concluded
from tasks.records import Outcome, Reported
from tasks.stage import Tracking
from tasks.study_report import write_study_report
from tasks.tracking import Run, run_url


@task(name="report")
def report_study(tracking: Tracking, study: Study, outcomes: list[Outcome]) -> Reported:
    """The report of a study. WorkError when no point of it came to anything."""
    started = time.monotonic()
    run = Run.resume(tracking.run_id)
    reported = write_study_report(
        home() / "reports" / tracking.run_id,
        study=study,
        experiment_yaml=configs.dump(study),
        outcomes=outcomes,
        environment=environment(),
        mlflow_url=run_url(tracking.experiment_id, tracking.run_id),
    )
    # What each point came to is shown by the runs below this one.
    summary = {
        "study/runs": float(len(outcomes)),
        "study/failed": float(sum(outcome.studied is None for outcome in outcomes)),
    }
    present(run, reported, title=study.name, data=None, summary=summary, head_ends_at="Configuration")
    concluded("report", time.monotonic() - started)
    return reported
