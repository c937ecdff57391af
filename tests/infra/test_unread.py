"""A run whose output nobody reads any more."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, sys, threading
from prefect.logging.configuration import setup_logging
from infra.unread import outlive_readers

setup_logging()
{patience}
sys.stdin.readline()

def spoken():
    logging.getLogger("deepzero_core").warning("a line from another thread")
    open(sys.argv[1], "w").write("still alive")

thread = threading.Thread(target=spoken)
thread.start()
thread.join()
{last}
"""


def ended(tmp_path: Path, patience: str, last: str) -> tuple[int, bool]:
    """The exit status of a process whose reader is gone, and whether its thread lived on."""
    mark = tmp_path / "mark"
    program = PROGRAM.format(patience=patience, last=last)
    command = [sys.executable, "-c", program, str(mark)]
    # Another test of this process may have made Prefect's console quiet: nothing would be written then.
    loud = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=loud
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    return process.wait(60), mark.exists()


def test_a_run_outlives_who_reads_it(tmp_path: Path) -> None:
    # Twice: a flow may be called by another. As MLflow writes, which takes the error for one of its store.
    last = "print('one'); sys.stdout.write('two'); sys.stdout.flush(); print('three', file=sys.stderr, flush=True)"
    assert ended(tmp_path, "outlive_readers(); outlive_readers()", last) == (0, True)


def test_what_is_read_is_what_was_written() -> None:
    program = "from infra.unread import outlive_readers; print('ä'); outlive_readers(); print('é'); print('ö', end='')"
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", program], capture_output=True, text=True, encoding="utf-8"
    )
    assert (done.stdout, done.stderr) == ("ä\né\nö", "")


def test_alone_rich_would_end_its_thread(tmp_path: Path) -> None:
    _, alive = ended(tmp_path, "", "")
    assert not alive
