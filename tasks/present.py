"""A finished report, given to MLflow and Prefect: the same for every flow."""

import json
from collections.abc import Mapping

from tasks.artifacts import show_report
from tasks.records import Reported
from tasks.stage import write_atomically
from tasks.tracking import Run

SUMMARY = "summary.json"


def present(
    run: Run,
    reported: Reported,
    *,
    title: str,
    data: tuple[str, str, Mapping[str, int]] | None,
    summary: Mapping[str, float],
    head_ends_at: str,
) -> None:
    """Report and numbers to the flow's run in MLflow, and what there is to see to Prefect.

    data: name, digest and counts of what was read. summary: what a list of runs is sorted by; summary.json has it, too.
    head_ends_at: the heading up to which the report stands at the head of the run's page.
    """
    markdown = reported.markdown.read_text(encoding="utf-8")
    write_atomically(reported.folder / SUMMARY, json.dumps(dict(summary), indent=2))
    run.artifact(reported.folder, "report")
    if data is not None:
        run.dataset(*data)
    run.tags({"mlflow.note.content": markdown.partition(f"\n## {head_ends_at}")[0]})
    run.metrics(summary, step=0)
    run.flush()
    show_report(reported, title=title, run_id=run.run_id)
