"""The Prefect worker of a stack: as `prefect worker start --type process`, but that a crash is reported once.

Prefect's own reports it when the process has ended, and again when the hooks have told MLflow, some seconds later. A
retry that was asked for in between, from the page of the run, was overruled or even begun twice.
"""

import sys
import warnings
from typing import TYPE_CHECKING

import httpx
from prefect.cli import app
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

# Prefect warns of two workers for one type of pool: here the second is meant to take the place of the first.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"Type '\w+' at .* has key 'process' that matches existing registered type")

    class Worker(ProcessWorker):
        async def _propose_crashed_state(
            self, flow_run: "FlowRun", message: str, client: PrefectClient | None = None
        ) -> None:
            """flow_run: as it was when it was begun."""
            begun = flow_run.state and flow_run.state.timestamp
            try:
                states = await (client or self.client).read_flow_run_states(flow_run.id)
                if any(state.is_crashed() and (begun is None or state.timestamp > begun) for state in states):
                    return
            except (httpx.HTTPError, ObjectNotFound):
                pass  # Prefect's own asks again and says what is wrong
            await super()._propose_crashed_state(flow_run, message, client)


if __name__ == "__main__":
    sys.exit(app())
