"""`deepzero up`, `status`, `logs`, `down`: the local stack from the command line."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from deepzero_core.errors import RequestError, suggest

if TYPE_CHECKING:
    from infra.stack.health import Row
    from infra.stack.state import Stack


def up(
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-w", min=0, max=64, help="Dask workers; otherwise one per core, 2 to 8."),
    ] = None,
    port: Annotated[
        list[str] | None,
        typer.Option("--port", metavar="NAME=NUMBER", help="A fixed port, such as mlflow=5001. May be repeated."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Listen there, for others too; wants credentials.")
    ] = "127.0.0.1",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let others in without credentials: they can run programs here.")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, metavar="SECONDS", help="How long to wait until all is well.")
    ] = 300.0,
) -> None:
    """Start Prefect, MLflow, Dask and a Prefect worker on this machine, or find them running."""
    from infra.stack import lifecycle, ports

    stack = lifecycle.up(
        say=_say,
        host=host,
        workers=workers,
        fixed=ports.parse(port or ()),
        insecure=insecure,
        timeout_s=timeout,
    )
    _show_places(stack)


def down() -> None:
    """End the stack, its flow runs and whatever it has left behind."""
    from infra.home import home
    from infra.stack import lifecycle

    ended = lifecycle.down(say=_say)
    print(f"the stack of {home()} is down" if ended else f"no stack was running in {home()}")


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show every service of the stack; exit status 0 when all are well, else 1."""
    from infra.home import home
    from infra.stack import health, leftovers, state

    base = home()
    stack = state.running(base)
    if stack is None:
        lost = len(leftovers.marked(base))
        found = f"{lost} of its processes are left without a supervisor" if lost else "no stack is running"
        mend = "`deepzero up` starts it anew, `deepzero down` ends them" if lost else "`deepzero up` starts one"
        print(json.dumps([]) if as_json else f"{base}: {found}; {mend}")
        raise typer.Exit(1)
    rows = health.examine(stack)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _show_rows(rows)
    raise typer.Exit(0 if all(row.healthy for row in rows) else 1)


def logs(
    service: Annotated[
        str | None, typer.Argument(metavar="[SERVICE]", help="A service of `deepzero status`; all when left out.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", min=0, metavar="LINES", help="How many of the last lines.")] = 50,
) -> None:
    """Show what the services have written."""
    from infra.home import home
    from infra.stack import journal, state

    folder = state.logs(home())
    files = {file.stem: file for file in sorted(folder.glob("*.log"))}
    if not files:
        raise RequestError(f"there are no logs in {folder} yet; `deepzero up` starts the stack that writes them")
    if service is not None and service not in files:
        raise RequestError(f"there is no log of {service!r}; {suggest(service, files)}")
    chosen = files if service is None else {service: files[service]}
    for name, line in journal.last(chosen, lines):
        _print_line(name, line, len(chosen))
    if follow:
        for name, line in journal.follow(chosen):
            _print_line(name, line, len(chosen))


def _print_line(name: str, line: str, files: int) -> None:
    print(line if files == 1 else f"{name}: {line}", flush=True)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _show_places(stack: "Stack") -> None:
    places = {
        "Prefect": stack.prefect_ui_url,
        "MLflow": stack.mlflow_url,
        "Dask": f"{stack.dask_address}  (workers: {stack.workers})",
        "Dask's pages": stack.dashboard_url,
    }
    for label, place in places.items():
        print(f"{label:<13} {place}")


def _show_rows(rows: "list[Row]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column in ("service", "state", "pid", "uptime", "address", "health"):
        table.add_column(column, justify="right" if column in ("pid", "uptime") else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row.service,
            row.state,
            str(row.pid or ""),
            "" if row.uptime_s is None else _duration(row.uptime_s),
            row.address,
            "well" if row.healthy else "[red]not well",
        )
    Console().print(table)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
