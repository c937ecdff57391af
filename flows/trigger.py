"""What `deepzero trigger` does: check the configuration, have a worker run it, say where to look; or follow it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import configs
from configs.study import Study
from deepzero_core.errors import RequestError, suggest
from flows.catalogue import ENTRYPOINTS
from infra import orchestration
from infra.prefect_api import client_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse


def submit(deployment: str, config: str, overrides: Sequence[str], *, watch: bool, json_file: Path | None) -> int:
    """Submit a run of a deployment, print its name, id and page; with `watch`, follow it. The exit status.

    deployment: flow/deployment, or the flow alone where they bear one name.

    Raises:
        RequestError: the configuration, the deployment or the server will not do; nothing has been submitted.
    """
    flow, _, name = deployment.partition("/")
    if flow not in ENTRYPOINTS:
        raise RequestError(f"there is no deployment {deployment!r}; {suggest(flow, ENTRYPOINTS)}")
    experiment = _with_absolute_paths(configs.load(config, overrides, flow=flow))
    console = Console()
    with client_of(api_url()) as client:
        found = _deployment(client, flow, name or flow)
        run = _submitted(client, found, experiment.model_dump(mode="json"))
        _tell(console, client, found, run)
        if not watch:
            return 0
        from flows.watch import follow

        return follow(console, client, run.id, json_file)


def api_url() -> str:
    """The address of the Prefect server that is meant. RequestError where none is."""
    orchestration.configure()
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    if not address:
        raise RequestError("there is no Prefect server to ask: `deepzero up` starts one, $PREFECT_API_URL names one")
    return str(address)


def _with_absolute_paths(experiment: Any) -> Any:
    """A worker has another working directory than whoever triggers."""
    if isinstance(experiment, Study):
        data = experiment.base.get("data") if isinstance(experiment.base, dict) else None
        if not isinstance(data, dict) or not isinstance(data.get("source"), str):
            return experiment
        base = {**experiment.base, "data": {**data, "source": str(_absolute(Path(data["source"])))}}
        return experiment.model_copy(update={"base": base})
    data = getattr(experiment, "data", None)
    if data is None or data.source is None:
        return experiment
    return experiment.model_copy(update={"data": data.model_copy(update={"source": _absolute(data.source)})})


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _deployment(client: "SyncPrefectClient", flow: str, name: str) -> "DeploymentResponse":
    from prefect.exceptions import ObjectNotFound

    wanted = f"{flow}/{name}"
    try:
        return client.read_deployment_by_name(wanted)
    except ObjectNotFound:
        pass
    flows = {each.id: each.name for each in client.read_flows()}
    there = [f"{flows.get(each.flow_id, '?')}/{each.name}" for each in client.read_deployments()]
    if not there:
        raise RequestError(
            "this Prefect server has no deployments: `deepzero up` makes them, and so does `prefect deploy --all`"
        )
    raise RequestError(f"there is no deployment {wanted!r} on this server; {suggest(wanted, there)}")


def _submitted(client: "SyncPrefectClient", deployment: "DeploymentResponse", experiment: dict[str, Any]) -> "FlowRun":
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        return client.create_flow_run_from_deployment(deployment.id, parameters={"experiment": experiment})
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in (400, 409, 422):
            raise
        detail = error.response.json().get("detail", error.response.text)
        raise RequestError(
            f"the server refuses this configuration ({detail}); is its deployment of another version? "
            "`prefect deploy --all` brings it up to date"
        ) from error


def _tell(console: Console, client: "SyncPrefectClient", deployment: "DeploymentResponse", run: "FlowRun") -> None:
    from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
    from prefect.utilities.urls import url_for

    for label, text in {"run": run.name, "id": str(run.id), "page": url_for(run) or "-"}.items():
        console.print(f"{label:<11} {text}", soft_wrap=True, highlight=False, markup=False)
    pool = deployment.work_pool_name
    if pool and not client.read_workers_for_work_pool(
        pool, worker_filter=WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
    ):
        console.print(
            f"note: no worker asks for runs of the pool {pool!r}, so that this one waits: `deepzero up`, or "
            f"`prefect worker start --pool {pool}`",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
