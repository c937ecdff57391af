"""What the doctor's checks return, and the process of its own in which they try what may be broken.

Only the standard library is imported: this works where the rest does not.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]

_TIMEOUT_S = 120


@dataclass(frozen=True)
class Check:
    """One finding. mend: what to do about it, empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Outcome:
    """text: the last line of what the process said; full: all of it."""

    ok: bool
    text: str
    full: str


def python(code: str, *arguments: str, settings: Mapping[str, str] | None = None) -> Outcome:
    """Run code in a fresh interpreter of this environment, with a state folder of its own for Prefect.

    settings: environment variables beside those of this process, such as addresses that hold passwords.
    """
    with tempfile.TemporaryDirectory(prefix="deepzero-doctor-") as folder:
        environment = {
            **os.environ,
            "PREFECT_HOME": folder,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            **(settings or {}),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                env=environment,
                cwd=folder,  # nothing in the present folder may shadow a package
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, f"no answer within {_TIMEOUT_S} s", "")
    said = done.stdout if done.returncode == 0 else done.stderr
    fallback = "" if done.returncode == 0 else f"the interpreter died with status {done.returncode}"
    return Outcome(done.returncode == 0, last_line(said) or fallback, said)


def last_line(said: str) -> str:
    """The last line that says something: of a traceback the error, without SQLAlchemy's appendix."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("(Background on", "[SQL:", "[parameters:"))]
    return one_line(telling[-1]) if telling else ""


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]
