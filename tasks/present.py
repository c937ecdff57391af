"""A finished report, given to MLflow and Prefect: the same for every flow."""

from collections.abc import Mapping

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from tasks.records import Reported
from tasks.tracking import Run


def present(
    run: Run,
    reported: Reported,
    *,
    title: str,
    url: str,
    data: tuple[str, str, Mapping[str, int]],
    summary: Mapping[str, float],
    head_ends_at: str,
) -> None:
    """Report and numbers to the flow's run in MLflow, a link to it and the report to Prefect.

    data: name, digest and counts of what was read. summary: what a list of runs is sorted by.
    head_ends_at: the heading up to which the report stands at the head of the run's page.
    """
    markdown = reported.markdown.read_text(encoding="utf-8")
    run.artifact(reported.folder, "report")
    run.dataset(*data)
    run.tags({"mlflow.note.content": markdown.partition(f"\n## {head_ends_at}")[0]})
    run.metrics(summary, step=0)
    run.flush()
    create_link_artifact(url, key="mlflow-run", link_text="MLflow run", description="Metrics, artifacts and the model")
    create_markdown_artifact(markdown, key="report", description=title)
