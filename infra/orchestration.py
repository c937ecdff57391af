"""Settings for flows that this process starts: local state, quiet console, no telemetry.

To be called before Prefect is imported: it reads its settings then.
"""

import os
from pathlib import Path

from infra.home import home
from infra.stack.state import joined

SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # What our packages log is kept with the run.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "infra,tasks,simulators,deepzero_core",
}
_QUIET = {
    **SETTINGS,
    # Prefect keeps its log, tracebacks included, with the run; the terminal shows the stages' own lines.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # Every stage would print two lines about its page.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A first start migrates a fresh database.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
}


def configure() -> None:
    """Defaults only: what the user has set stays. A stack that runs is reported to; else what the user keeps in a
    Prefect profile stays, too.

    Raises:
        RequestError: a file that holds a secret of the stack cannot be read.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    stack, own_api = joined(home()), "PREFECT_API_URL" in os.environ
    if stack is not None:
        from infra.stack import secrets, services

        given = secrets.read(stack.secret_files).values
        # The stack's passwords are for the stack: not for a server that the user has named.
        if not own_api:
            os.environ.update(services.prefect_client(stack, given))
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.update(services.mlflow_client(given))
    own_profiles = Path.home() / ".prefect" / "profiles.toml"
    if "PREFECT_HOME" not in os.environ and not own_api and (stack is not None or not own_profiles.exists()):
        folder = home() / "prefect"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["PREFECT_HOME"] = str(folder)


def ui_place() -> str:
    """Where the pages of the server are that these flows report to: its address, or the command that shows them."""
    stack = joined(home())
    if stack is not None and os.environ.get("PREFECT_API_URL") == stack.prefect_api_url:
        return stack.prefect_ui_url
    kept = os.environ.get("PREFECT_HOME")
    return f"PREFECT_HOME={kept} prefect server start" if kept else "prefect server start"
