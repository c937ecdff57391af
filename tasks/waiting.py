"""What runs could not tell MLflow, delivered later: at the end of a flow, at the start of the next, or on demand."""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from deepzero_core.errors import RequestError, WorkError
from infra.home import home
from tasks.delivery import Outbox, RefusedError, UnavailableError
from tasks.gate import gate
from tasks.spool import Spool, SpoolInUseError, waiting
from tasks.tracking_store import VARIABLE as STORE_VARIABLE
from tasks.tracking_store import tracking_uri, with_store

_log = logging.getLogger(__name__)

VARIABLE = "DEEPZERO_MLFLOW_WAIT_S"
_DEFAULT_WAIT_S = 60.0
_POLL_S = 1.0


@dataclass(frozen=True)
class Delivered:
    """runs: delivered completely; left: spools in which something waits on; elsewhere: of another store."""

    runs: int
    left: tuple[Path, ...]
    elsewhere: tuple[Path, ...]


def patience_s() -> float:
    """Seconds that a flow waits at its end for a store that is away. RequestError when the variable is no number."""
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else _DEFAULT_WAIT_S
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise RequestError(f"{VARIABLE}={text!r} has to be a number of seconds, such as 60, or 0 for no waiting")
    return seconds


def deliver_waiting() -> Delivered:
    """Deliver what lies below deepzero's home and no living process holds, as far as the store takes it now."""
    runs, left, elsewhere = 0, [], []
    gate(tracking_uri()).ask_now()
    for path in waiting(home()):
        try:
            spool = Spool(path)
        except SpoolInUseError:
            continue
        except WorkError as error:
            _log.warning("%s", error)
            left.append(path)
            continue
        if spool.empty:  # a process that was killed with nothing left to tell
            spool.close()
            continue
        head = spool.head
        # Where the first line is damaged, the file's name says whose it is.
        outbox = Outbox(spool, str(head.get("run_id", path.stem)), began=bool(head.get("began", True)), doubt=True)
        try:
            if outbox.gate.passable() and not outbox.at_home():
                elsewhere.append(path)
            elif _delivered(outbox):
                runs += 1
            else:
                left.append(path)
        except UnavailableError:
            left.append(path)
        finally:
            outbox.close()
    return Delivered(runs, tuple(left), tuple(elsewhere))


def deliver_on_demand() -> str:
    """What `deepzero deliver` does, and says.

    Raises:
        RequestError, WorkError: the store does not open, or does not take everything.
    """
    found = with_store(lambda client: deliver_waiting())
    if found.left:
        raise WorkError(
            f"MLflow does not take everything about {len(found.left)} runs: it waits in {_places(found.left)}"
        )
    said = [f"MLflow has been told about {found.runs} runs" if found.runs else "nothing waits for this MLflow store"]
    if found.elsewhere:
        said.append(f"what belongs to another store waits until {STORE_VARIABLE} names it: {_places(found.elsewhere)}")
    return "\n".join(said)


def settle(patience: float) -> None:
    """At the end of a flow: wait so many seconds for a store that is away, and say what has to wait longer."""
    found = deliver_waiting()
    if found.left and patience:
        _log.warning(
            "MLflow does not answer: waiting up to %g s (%s) to tell it about %d runs",
            patience,
            VARIABLE,
            len(found.left),
        )
        deadline = time.monotonic() + patience
        while found.left and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            found = deliver_waiting()
    if found.left:
        _log.warning(
            "MLflow has not been told everything about %d runs (%s): it waits in %s, and `deepzero deliver` or the "
            "next run delivers it",
            len(found.left),
            gate(tracking_uri()).why or "it did not take it",
            found.left[0].parent,
        )


def _places(paths: tuple[Path, ...]) -> str:
    return ", ".join(str(path) for path in paths)


def _delivered(outbox: Outbox) -> bool:
    """Deliver one spool; whether nothing is left."""
    try:
        return outbox.try_to_deliver()
    except RefusedError:
        return True  # told, and put aside
    except WorkError as error:
        _log.warning("%s", error)
        return False
