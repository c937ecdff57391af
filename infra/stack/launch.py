"""What the supervisor starts: `python -m infra.stack.launch HOME SERVICE` becomes that service.

A service gets its secrets here, out of the supervisor's environment: they stand in no file and on no command line.
"""

import os
import sys
import time
from pathlib import Path

from deepzero_core.errors import DeepZeroError, WorkError
from infra.stack import health, leftovers, secrets, services, state

_WAIT_S = 120.0
_GRACE_S = 5.0


def main(home: str, name: str) -> None:
    """Become the service; WorkError where the state file does not know it."""
    stack = state.recorded(Path(home))
    service = next((one for one in services.services(stack) if one.name == name), None) if stack else None
    if stack is None or service is None:
        raise WorkError(
            f"{state.state_file(Path(home))} says nothing of {name}; `deepzero down` and `deepzero up` mend it"
        )
    if not service.runs_on:
        # Children of a service that was killed may still hold its port.
        leftovers.end(leftovers.marked(home, name), _GRACE_S)
    if service.needs is not None:
        _wait(stack, service.needs)
    given = secrets.read(stack.secret_files)
    command = services.command(stack, name, given)
    os.execve(command[0], command, services.environment(stack, name, given))


def _wait(stack: state.Stack, needed: str) -> None:
    """Starting without it would only fail, again and again."""
    deadline = time.monotonic() + _WAIT_S
    while not health.answers(services.health_url(stack, needed)):
        if time.monotonic() > deadline:
            raise WorkError(f"{needed} was not well within {_WAIT_S:g} s")
        time.sleep(0.25)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DeepZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
