"""Showing the results of earlier runs."""

import json
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from deepzero_core.errors import RequestError, suggest
from flows.closing_table import closing_tables
from infra.home import home
from infra.orchestration import configure
from infra.orchestration import ui_place as prefect_ui

if TYPE_CHECKING:
    from mlflow.entities import Run

LATEST = "latest"
_FLOW_RUN = "deepzero.flow_run"
_SEARCHED = 1000


def show(run: str | None, *, opened: bool = False) -> int:
    """Print the closing table of a run and its places; the exit status that the run itself had.

    run: MLflow run id or the beginning of one, name of the run or of its experiment, result.json or the folder it lies
        in, or `latest`, which None means as well. opened: show the report in a browser, too.

    Raises:
        RequestError: there is no such run, or several are meant by a beginning.
    """
    configure()
    result = find(run)
    status = conclude(Console(), result)
    if opened:
        webbrowser.open(result.with_name("report.html").as_uri())
    return status


def find(run: str | None) -> Path:
    """The result.json of a run, see `show`."""
    if run and (named := _file(Path(run))):
        return named
    wanted = "" if run in (None, LATEST) else str(run)
    reports = home() / "reports"
    found = sorted(reports.glob("*/result.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    by_id = [path for path in found if path.parent.name.startswith(wanted)]
    if by_id and (not wanted or len(by_id) == 1):
        return by_id[0]
    if len(by_id) > 1:
        newest = ", ".join(path.parent.name[: len(wanted) + 6] for path in by_id[:3])
        raise RequestError(f"{len(by_id)} runs begin with {wanted!r}; the newest are {newest}")
    recorded = _recorded()
    if not found and not recorded:
        raise RequestError(f"there is no report in {reports} yet: `deepzero run pipeline --config demo` makes one")
    for each in recorded:
        # Newest first: of several runs of one name the last one is meant.
        if wanted in (each.info.run_name, each.info.run_id) or each.data.params.get("name") == wanted or not wanted:
            return result_of(each)
    names = {str(each.info.run_name) for each in recorded} | {str(each.data.params.get("name")) for each in recorded}
    raise RequestError(f"no run is called {wanted!r} or has an id that begins like this; {_near(wanted, names, found)}")


def of_flow_run(flow_run_id: str) -> Path | None:
    """The result.json of a flow run of Prefect, where its report can be reached: here or in MLflow."""
    recorded = _recorded(f"tags.`{_FLOW_RUN}` = '{flow_run_id}'")
    try:
        return result_of(recorded[0]) if recorded else None
    except RequestError:
        return None


def result_of(run: "Run") -> Path:
    """The result.json of an MLflow run: on this machine, or fetched. RequestError when it has none."""
    from mlflow import MlflowClient

    from tasks.tracking_store import STORE_ERRORS, one_line, tracking_uri

    here = home() / "reports" / run.info.run_id / "result.json"
    if here.is_file():
        return here
    folder = Path(tempfile.mkdtemp(prefix=f"deepzero-report-{run.info.run_id[:8]}-"))
    try:
        fetched = MlflowClient(tracking_uri=tracking_uri()).download_artifacts(run.info.run_id, "report", str(folder))
    except STORE_ERRORS as error:
        state = str(run.info.status).lower()
        raise RequestError(
            f"the run {run.info.run_name!r} ({run.info.run_id}, {state}) has no report: {one_line(error)}"
        ) from error
    return Path(fetched) / "result.json"


def _file(path: Path) -> Path | None:
    """The result.json that a path names, where it is one; RequestError for a path that leads to none."""
    candidate = path / "result.json" if path.is_dir() else path
    if candidate.is_file():
        return candidate
    if path.is_dir() or path.suffix == ".json" or len(path.parts) > 1:
        raise RequestError(f"{path}: there is no result.json; name a run, a result file or the folder of a report")
    return None


def _recorded(condition: str | None = None) -> "list[Run]":
    """The flows' runs in MLflow, newest first; none where there is no store yet.

    Raises:
        RequestError: the store does not answer.
    """
    from mlflow import MlflowClient

    from tasks.tracking_store import STORE_ERRORS, one_line, probe, store_exists, tracking_uri

    if not store_exists():
        return []
    uri = tracking_uri()
    try:
        probe(uri)
        client = MlflowClient(tracking_uri=uri)
        experiments = [each.experiment_id for each in client.search_experiments()]
        wanted = condition or "tags.`deepzero.flow` != ''"
        return list(
            client.search_runs(experiments, wanted, order_by=["attributes.start_time DESC"], max_results=_SEARCHED)
        )
    except STORE_ERRORS as error:
        raise RequestError(
            f"MLflow does not answer, so that runs can be named by their ids only: {one_line(error)}"
        ) from error


def _near(wanted: str, names: set[str], found: list[Path]) -> str:
    if found and all(character in "0123456789abcdef" for character in wanted):
        return f"the newest are {', '.join(path.parent.name[:12] for path in found[:3])}"
    return suggest(wanted, names)


def conclude(console: Console, result_file: Path) -> int:
    """Print the closing table of a result, and where everything lies; the exit status of the run.

    Raises:
        RequestError: this is no result.
    """
    from tasks.tracking import tracking_uri, ui_command
    from tasks.tracking_store import without_password

    try:
        result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        title, methods, notes = result["title"], result["table"], result["notes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{result_file} is not the result of a run: {error!r}") from error
    for table in closing_tables(methods["columns"], methods["rows"], console.width, title):
        console.print(table)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    places = {
        "report": result_file.with_name("report.html"),
        "MLflow run": result["mlflow_url"],
        "MLflow UI": ui_command() or without_password(tracking_uri()),
        "Prefect UI": prefect_ui(),
    }
    for label, place in places.items():
        console.print(f"{label:<11} {place}", soft_wrap=True, highlight=False)
    return 1 if result.get("failed") else 0
