"""Prefect's settings for flows that this process starts: local state, quiet console, no telemetry.

To be called before Prefect is imported: it reads its settings then.
"""

import os
from pathlib import Path

from infra.home import home

_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # Prefect keeps its log, tracebacks included, with the run; the terminal shows the stages' own lines.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # What our packages log is kept with the run too.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "infra,tasks,deepzero_core",
    # A first start migrates a fresh database.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
}


def configure() -> None:
    """Defaults only: what the user has set, or keeps in a Prefect profile, stays."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    own_profiles = Path.home() / ".prefect" / "profiles.toml"
    if "PREFECT_HOME" not in os.environ and "PREFECT_API_URL" not in os.environ and not own_profiles.exists():
        folder = home() / "prefect"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["PREFECT_HOME"] = str(folder)


def ui_command() -> str:
    """The command that shows the pages of the server that these flows report to."""
    kept = os.environ.get("PREFECT_HOME")
    return f"PREFECT_HOME={kept} prefect server start" if kept else "prefect server start"
