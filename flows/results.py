"""Finding and showing the results of earlier runs."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from deepzero_core.errors import RequestError
from flows.closing_table import closing_tables
from infra.home import home
from infra.orchestration import configure
from infra.orchestration import ui_command as prefect_ui_command


def show(run: str | None) -> None:
    """Print the closing table of a run (MLflow run id or the beginning of one; None: the newest) and its places."""
    configure()
    conclude(Console(), find(run) / "result.json")


def find(run: str | None) -> Path:
    """The report folder of a run.

    Raises:
        RequestError: there is none, or several begin like this.
    """
    reports = home() / "reports"
    folders = sorted(reports.glob("*/result.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not folders:
        raise RequestError(f"there is no report in {reports} yet: `deepzero run pipeline --config demo` makes one")
    found = [path.parent for path in folders if path.parent.name.startswith(run or "")]
    if not found or (run and len(found) > 1):
        what = f"{len(found)} runs begin with {run!r}" if found else f"no run begins with {run!r}"
        newest = ", ".join(path.parent.name[:12] for path in folders[:3])
        raise RequestError(f"{what}; the newest are {newest}")
    return found[0]


def conclude(console: Console, result_file: Path) -> None:
    """The closing table of a result, and where everything lies."""
    from tasks.tracking import ui_command

    result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    methods = result["table"]
    for table in closing_tables(methods["columns"], methods["rows"], console.width, result["title"]):
        console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    places = {
        "report": result_file.with_name("report.html"),
        "MLflow run": result["mlflow_url"],
        "MLflow UI": ui_command() or "the server that $MLFLOW_TRACKING_URI names",
        "Prefect UI": prefect_ui_command(),
    }
    for label, place in places.items():
        console.print(f"{label:<11} {place}", soft_wrap=True, highlight=False)
