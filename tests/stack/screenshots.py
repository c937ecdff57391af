"""Pictures of the pages of a running stack, for the documentation: headless Chromium, nothing but this machine.

DEEPZERO_HOME=… python tests/stack/screenshots.py docs/images     # of the stack that runs in that home
"""

import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Page, Route, sync_playwright

from infra.stack.state import Stack, running

LARGEST = 150_000
_FLAGS = (
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_SIZE = {"width": 1280, "height": 800}
_COLOURS = (256, 128, 64, 32, 16)
_PATIENCE_MS = 60_000
_SETTLED_MS = 3_000  # charts are drawn in steps after the last answer
_FLOW = "classify"


def chromium() -> str | None:
    """The browser of this machine."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pages(stack: Stack) -> dict[str, tuple[str, str]]:
    """Name of the picture -> (address, a text that the page shows once it has its data).

    There must be two finished runs of `classify` in Prefect and in MLflow.
    """
    prefect = f"{stack.prefect_api_url}/"
    deployment = httpx.get(f"{prefect}deployments/name/{_FLOW}/{_FLOW}", timeout=30).raise_for_status().json()["id"]
    asked = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "sort": "END_TIME_DESC", "limit": 1}
    flow_run = httpx.post(f"{prefect}flow_runs/filter", json=asked, timeout=30).raise_for_status().json()[0]
    ui = stack.prefect_ui_url
    experiment, first, second = _mlflow_runs(stack)
    tracking = f"{stack.mlflow_url}/#/experiments/{experiment}"
    compared = f"{stack.mlflow_url}/#/compare-runs?runs=[%22{first}%22,%22{second}%22]&experiments=[%22{experiment}%22]"
    models = "workflowType=machine_learning"
    return {
        "prefect-runs": (f"{ui}/runs", flow_run["name"]),
        "prefect-run": (f"{ui}/runs/flow-run/{flow_run['id']}", "Completed"),
        "prefect-deployments": (f"{ui}/deployments", "solver-loop"),
        "prefect-schedule": (f"{ui}/deployments/deployment/{deployment}", "Schedule"),
        "prefect-form": (f"{ui}/deployments/deployment/{deployment}/run", "experiment"),
        "mlflow-runs": (f"{tracking}/runs?{models}", "classify"),
        "mlflow-run": (f"{tracking}/runs/{first}?{models}", "Metrics"),
        "mlflow-comparison": (f"{compared}&{models}", "Comparing 2 Runs"),
    }


def take(stack: Stack, folder: Path) -> list[Path]:
    """Every picture, as a PNG of at most 150 kB each."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages(stack)
    taken = []
    with browser() as page:
        for name, (address, text) in wanted.items():
            page.goto("about:blank")
            page.goto(address, timeout=_PATIENCE_MS)
            page.get_by_text(text).locator("visible=true").first.wait_for(timeout=_PATIENCE_MS)
            page.wait_for_timeout(_SETTLED_MS)
            taken.append(folder / f"{name}.png")
            taken[-1].write_bytes(reduced(page.screenshot()))
    return taken


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a fresh browser that reaches this machine only."""
    with tempfile.TemporaryDirectory(prefix="dz-chromium-") as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=chromium(),
            headless=True,
            chromium_sandbox=False,
            args=list(_FLAGS),
            viewport=_SIZE,  # type: ignore[arg-type]
            color_scheme="light",
        )
        try:
            context.route("**/*", _local_only)
            yield context.new_page()
        finally:
            context.close()


def reduced(picture: bytes) -> bytes:
    """The same with as many colours as fit into `LARGEST` bytes."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    smaller = picture
    for colours in _COLOURS:
        buffer = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        smaller = buffer.getvalue()
        if len(smaller) <= LARGEST:
            break
    return smaller


def _mlflow_runs(stack: Stack) -> tuple[str, str, str]:
    """The experiment and the two newest runs of whole flows in it."""
    api = f"{stack.mlflow_url}/api/2.0/mlflow"
    everything = {"max_results": 100}
    experiments: list[dict[str, Any]] = httpx.get(f"{api}/experiments/search", params=everything, timeout=30).json()[
        "experiments"
    ]
    wanted = {"experiment_ids": [one["experiment_id"] for one in experiments], "filter": "tags.`deepzero.flow` != ''"}
    runs = httpx.post(f"{api}/runs/search", json=wanted, timeout=30).raise_for_status().json()["runs"]
    finished = [run["info"] for run in runs if run["info"]["status"] == "FINISHED"]
    first, second = finished[:2]
    return first["experiment_id"], first["run_id"], second["run_id"]


def _local_only(route: Route) -> None:
    if route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
        route.continue_()
    else:
        route.abort()


if __name__ == "__main__":
    found = running()
    if found is None:
        sys.exit("error: no stack is running in this home; `deepzero up` starts one")
    for file in take(found, Path(sys.argv[1])):
        print(f"{file}: {file.stat().st_size:,} bytes")
