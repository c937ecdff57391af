"""The deployments of prefect.yaml on a Prefect server: applied without a question, again and again."""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

import configs
from deepzero_core.errors import RequestError, WorkError
from infra.prefect_api import client_of, without_password

FILE = Path(__file__).resolve().parent.parent / "prefect.yaml"
POOL = "deepzero"

_RUNS_AT_ONCE = 2
_PATIENCE_S = 300.0


def preset(flow: str, name: str) -> dict[str, Any]:
    """A step of prefect.yaml: what a deployment's form begins with is a preset, everything filled in."""
    return {"experiment": configs.load(name, flow=flow).model_dump(mode="json")}


def apply(api_url: str) -> list[str]:
    """Work pool, limits and deployments of prefect.yaml on the server at `api_url`, such as http://127.0.0.1:4200/api.

    What is there is brought up to date. What the user has made of it stays: the limit of the pool, and every schedule
    that is there already, on or off.

    Returns:
        The names of the deployments, flow/deployment.

    Raises:
        RequestError: no server answers there, or it asks for a password; prefect.yaml is not there.
        WorkError: the server did not take a deployment.
    """
    try:
        wanted = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{FILE} cannot be read ({error.strerror}): deployments are made from a checkout") from error
    _bring_up_pool(api_url, wanted["deployments"])
    with tempfile.TemporaryDirectory(prefix="deepzero-deploy-") as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
        _deploy_all(api_url, file)
    return sorted(f"{_flow_of(deployment)}/{deployment['name']}" for deployment in wanted["deployments"])


def _bring_up_pool(api_url: str, deployments: list[dict[str, Any]]) -> None:
    """Make the work pool where there is none; leave out of `deployments` the schedules that the server has."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    with client_of(api_url) as client:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template, concurrency_limit=_RUNS_AT_ONCE)
        with suppress(ObjectAlreadyExists):  # then its limit is the user's
            client.create_work_pool(pool)
        for deployment in deployments:
            try:
                there = client.read_deployment_by_name(f"{_flow_of(deployment)}/{deployment['name']}")
            except ObjectNotFound:
                continue
            slugs = {schedule.slug for schedule in there.schedules}
            # Beside a schedule without a slug, which is the user's, Prefect would replace them all.
            new = [each for each in deployment["schedules"] if each["slug"] not in slugs]
            deployment["schedules"] = [] if None in slugs else new


def _flow_of(deployment: dict[str, Any]) -> str:
    """Of each flow there is one deployment, and it bears the flow's name."""
    return str(deployment["name"])


def _deploy_all(api_url: str, file: Path) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
    environment = {**os.environ, "PREFECT_API_URL": api_url, "PREFECT_CLI_COLORS": "false", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=FILE.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise WorkError(
            f"the deployments were not taken by {without_password(api_url)} within {_PATIENCE_S:.0f} s"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip(" │╭╮╰╯─")]
        raise WorkError(
            f"the deployments were not taken by {without_password(api_url)}: {lines[-1] if lines else 'without a word'}"
        )
