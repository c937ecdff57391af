"""Following a flow run that a worker executes: its states and what its stages say, to the end."""

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from rich.console import Console

from deepzero_core.errors import WorkError
from flows.catalogue import PACKAGES
from flows.results import conclude, of_flow_run
from infra.prefect_api import without_password

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, Log, State

COMPLETED, FAILED, REFUSED, CANCELLED = 0, 1, 2, 130
_REFUSED = re.compile(r"exception: RequestError|^Validation of flow parameters failed")
_EVERY_S = 1.0
_PATIENCE_S = 120.0
_LATE_S = 2.0
_DISORDER = timedelta(seconds=30)
_PAGE = 200


def follow(console: Console, client: "SyncPrefectClient", run_id: UUID, json_file: Path | None) -> int:
    """Print states and lines of a run as they come, then its closing table; the run's exit status.

    Ctrl-C ends the watching, not the run, and says how to end that.
    """
    try:
        run = _to_the_end(console, client, run_id)
    except KeyboardInterrupt:
        console.print(
            f"\nno longer watching; the run goes on. `prefect flow-run cancel {run_id}` ends it "
            f"(PREFECT_API_URL={without_password(str(client.api_url))})",
            soft_wrap=True,
            highlight=False,
        )
        return CANCELLED
    assert run.state is not None
    if run.state.is_cancelled():
        console.print(
            "the run was cancelled; triggered again, the same configuration goes on from its last checkpoint",
            soft_wrap=True,
        )
        return CANCELLED
    if not run.state.is_completed():
        return REFUSED if _REFUSED.search(run.state.message or "") else FAILED
    result = of_flow_run(str(run_id))
    if result is None:
        console.print(
            "the report cannot be reached from here: neither this home nor MLflow ($MLFLOW_TRACKING_URI) has it",
            soft_wrap=True,
        )
        return COMPLETED
    if json_file is not None:
        from tasks.stage import write_atomically

        write_atomically(json_file, result.read_text(encoding="utf-8"))
    return conclude(console, result)


def _to_the_end(console: Console, client: "SyncPrefectClient", run_id: UUID) -> "FlowRun":
    lines = _Lines(console, client, run_id)
    told: tuple[str, ...] = ()
    while True:
        run = _read(client, run_id)
        state = run.state
        if state is not None:
            # The last lines of a run are on their way for a moment after its state.
            lines.show(settle=state.is_final())
            if (news := (state.name or "", _message(state))) != told:
                told = news
                console.print(f"{news[0].lower()}{': ' + news[1] if news[1] else ''}", highlight=False, markup=False)
            if state.is_final():
                return run
        time.sleep(_EVERY_S)


def _read(client: "SyncPrefectClient", run_id: UUID) -> "FlowRun":
    """The run; a server that is away for a while is waited for."""
    import httpx

    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return client.read_flow_run(run_id)
        except httpx.TransportError as error:
            if time.monotonic() > deadline:
                raise WorkError(
                    f"the Prefect server has not answered for {_PATIENCE_S:.0f} s ({type(error).__name__}); "
                    f"what has become of the run {run_id} it tells when it is back"
                ) from error
            time.sleep(_EVERY_S)


def _message(state: "State") -> str:
    """What is worth saying of a state beside its name."""
    message = " ".join((state.message or "").split())
    return message[:500] if state.is_failed() or state.is_crashed() else ""


class _Lines:
    """The lines of a run's log that have not been shown yet."""

    def __init__(self, console: Console, client: "SyncPrefectClient", run_id: UUID) -> None:
        self._console, self._client, self._run_id = console, client, run_id
        self._since = datetime.fromtimestamp(0, UTC)
        self._shown: set[UUID] = set()

    def show(self, *, settle: bool = False) -> None:
        """`settle`: look again after a moment."""
        for wait in (0.0, _LATE_S) if settle else (0.0,):
            time.sleep(wait)
            offset, since = 0, self._since
            while page := self._page(since, offset):
                self._print(page)
                offset += len(page)

    def _page(self, since: datetime, offset: int) -> "list[Log]":
        import httpx
        from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterTimestamp

        wanted = LogFilter(
            flow_run_id=LogFilterFlowRunId(any_=[self._run_id]), timestamp=LogFilterTimestamp(after_=since)
        )
        try:
            return self._client.read_logs(wanted, limit=_PAGE, offset=offset)
        except httpx.TransportError:
            return []  # the next look shows them

    def _print(self, page: "list[Log]") -> None:
        for log in page:
            if log.id in self._shown:
                continue
            self._shown.add(log.id)
            # A task's lines may come in later than those of its flow that are younger.
            self._since = max(self._since, log.timestamp - _DISORDER)
            # What Prefect says of its own machinery is for its pages; what ends a run badly stands in its last state.
            if log.name.partition(".")[0] in PACKAGES:
                self._console.print(log.message.rstrip(), highlight=False, markup=False, soft_wrap=True)
