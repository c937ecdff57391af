"""What a flow run shows in Prefect's pages: its MLflow run, report, result, pictures and progress.

Pages are for looking at: a Prefect server that does not take them is logged, and the run goes on.
"""

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tasks.beside import beside
from tasks.records import Reported
from tasks.tracking_store import artifact_url

_log = logging.getLogger(__name__)

_PATIENCE_S = 5.0
_EVERY_S = 10.0
_AFTER_A_FAILURE_S = 120.0
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([\w.-]+)\)")


def show_link(url: str) -> None:
    """To the MLflow run of the flow run that begins; what it measures is there from then on."""
    with _shown("the link to MLflow"):
        create_link_artifact(url, key="mlflow-run", link_text="MLflow run", description="Metrics, files and the model")


def show_report(reported: Reported, *, title: str, run_id: str) -> None:
    """Report, table and pictures of a run whose report MLflow has, below report/.

    run_id: of the MLflow run. Pictures are shown where a browser can fetch them: from an MLflow server.
    """
    result: dict[str, Any] = json.loads(reported.result.read_text(encoding="utf-8"))
    table = result["table"]
    addresses = {file: artifact_url(run_id, f"report/{file}") for file in result["pictures"].values()}
    markdown = _PICTURE.sub(
        lambda found: f"![{found[1]}]({address})" if (address := addresses.get(found[2])) else "",
        reported.markdown.read_text(encoding="utf-8"),
    )
    with _shown("the report"):
        create_markdown_artifact(markdown, key="report", description=title)
        create_table_artifact(
            [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]], key="result", description=title
        )
        for name, file in result["pictures"].items():
            if address := addresses[file]:
                create_image_artifact(address, key=slug(f"picture {name}"), description=f"{title}: {name}")


class Gauge:
    """The progress of a stage as an artifact, brought up to date every few seconds, while the stage goes on; nothing
    outside a Prefect task."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._artifact: UUID | None = None
        self._due = 0.0
        self._percent = -1.0

    def show(self, percent: float, *, last: bool = False) -> None:
        """`last`: at once, waited for, and only where it was shown before."""
        if TaskRunContext.get() is None:
            return
        if last:
            beside(lambda: self._artifact and self._update(percent)).result()
        elif time.monotonic() >= self._due:
            self._due = time.monotonic() + _EVERY_S
            beside(lambda: self._update(percent))

    def _update(self, percent: float) -> None:
        if percent == self._percent:
            return
        with _shown(f"the progress of {self._stage}"):
            if self._artifact is None:
                self._artifact = create_progress_artifact(
                    percent, key=slug(f"progress {self._stage}"), description=self._stage
                )
            else:
                update_progress_artifact(self._artifact, percent)
            self._percent = percent
        if self._percent != percent:
            self._due = time.monotonic() + _AFTER_A_FAILURE_S


def slug(text: str) -> str:
    """Text as the key of an artifact: lower case, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@contextmanager
def _shown(what: str) -> Iterator[None]:
    try:
        with temporary_settings(
            {PREFECT_API_REQUEST_TIMEOUT: _PATIENCE_S, PREFECT_CLIENT_MAX_RETRIES: 0},
        ):
            yield
    except (httpx.HTTPError, PrefectException) as error:
        _log.warning("Prefect did not take %s: %s", what, " ".join(f"{type(error).__name__}: {error}".split())[:300])
