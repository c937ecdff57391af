"""The command line. Exit status: 0 done, 2 the request was wrong, 1 the work failed, 130 interrupted.

Everything heavy (torch, Prefect, MLflow) is imported inside the commands: help and configuration answer at once.
"""

import contextlib
import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deepzero_core.errors import DeepZeroError, RequestError, suggest
from flows import stack_commands
from flows.catalogue import ENTRYPOINTS
from infra.hidden import hidden

FLOWS = tuple(ENTRYPOINTS)

app = typer.Typer(
    name="deepzero",
    help="Train neural networks without a gradient, certify them, and keep track of every run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(no_args_is_help=True, help="Prepare and verify data sets.")
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value, such as training.epochs=10. May be repeated."),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; ends in SystemExit."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="deepzero")
    except KeyboardInterrupt:  # before a command had begun
        _interrupted()


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose failures end in one line on stderr and their exit status."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise  # typer's own ways out
        except KeyboardInterrupt:
            _interrupted()
        except DeepZeroError as error:
            if _debug():
                traceback.print_exc()
            _complain(str(error))
            raise SystemExit(error.exit_code) from None
        except Exception as error:
            log = _write_log(error)
            if _debug():
                traceback.print_exc()
            _complain(f"{_summary(error)} (unexpected; the traceback is in {log})")
            raise SystemExit(1) from None

    return wrapper


def _complain(message: str) -> None:
    for line in message.splitlines() or [""]:
        print(f"error: {line}", file=sys.stderr)


def _interrupted() -> None:
    print("interrupted", file=sys.stderr)
    raise SystemExit(130) from None


def _debug() -> bool:
    return os.environ.get("DEEPZERO_DEBUG", "") not in ("", "0")


def _summary(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {hidden(first)[:300]}" if first else type(error).__name__


def _write_log(error: Exception) -> Path:
    """The traceback in a new file below the state folder, or below the temporary folder when that cannot be written."""
    from infra.home import home, logs

    text = hidden("".join(traceback.format_exception(error)))
    stem = f"failure-{time.strftime('%Y%m%d-%H%M%S')}-"
    with contextlib.suppress(OSError, RequestError):
        folder = logs(home())
        folder.mkdir(parents=True, exist_ok=True)
        return _new_file(stem, folder, text)
    return _new_file(f"deepzero-{stem}", None, text)


def _new_file(stem: str, folder: Path | None, text: str) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix=stem, suffix=".log", dir=folder, delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(text)
    return Path(file.name)


def _version(value: bool) -> None:
    if value:
        import importlib.metadata

        print(f"deepzero {importlib.metadata.version('deepzero')}")
        raise typer.Exit


@app.callback()
def _deepzero(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@_reported
def run(
    flow: Annotated[str, typer.Argument(metavar="FLOW", help=f"One of: {', '.join(FLOWS)}.")],
    config: Annotated[
        str, typer.Option("--config", "-c", metavar="NAME|FILE", help="A preset or a YAML file.")
    ] = "demo",
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results to this file for machines.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done and stop.")] = False,
) -> None:
    """Run a flow: classify; pipeline (with certification); defend (a classifier that may only be queried); solver-loop
    (a coarse solver, corrected by a network); study (a flow for every point of a grid of settings)."""
    if flow not in FLOWS:
        raise RequestError(f"there is no flow {flow!r}; {suggest(flow, FLOWS)}")
    import configs

    experiment = configs.load(config, overrides or (), flow=flow)
    if json_file is not None:
        _check_writable(json_file)
    from flows.run import execute

    raise typer.Exit(execute(flow, experiment, json_file=json_file, dry_run=dry_run))


@app.command()
@_reported
def trigger(
    deployment: Annotated[
        str, typer.Argument(metavar="DEPLOYMENT", help="Such as classify; `prefect deployment ls` lists them.")
    ],
    config: Annotated[
        str, typer.Option("--config", "-c", metavar="NAME|FILE", help="A preset or a YAML file.")
    ] = "demo",
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the run to its end.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="With --watch: write the results to this file.")
    ] = None,
) -> None:
    """Have a worker run a flow: submit it to the Prefect server of $PREFECT_API_URL or of `deepzero up`.

    Exit status with --watch: that of the run, 0 completed, 1 failed or crashed, 130 cancelled.
    """
    if json_file is not None:
        if not watch:
            raise RequestError("--json needs --watch: there are no results before the run has ended")
        _check_writable(json_file)
    from flows.trigger import submit

    raise typer.Exit(submit(deployment, config, overrides or (), watch=watch, json_file=json_file))


@app.command()
@_reported
def report(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="MLflow run id, or how it begins; name of a run; a result file; `latest`, which is the default.",
        ),
    ] = None,
    opened: Annotated[bool, typer.Option("--open", help="Show the report in a browser, too.")] = False,
) -> None:
    """Show the closing table of an earlier run and where its report lies."""
    from flows.results import show

    raise typer.Exit(show(run, opened=opened))


def _check_writable(file: Path) -> None:
    """RequestError now rather than after hours of work."""
    folder = file.absolute().parent
    if file.is_dir():
        raise RequestError(f"--json {file}: this is a folder; name a file in it")
    if not folder.is_dir():
        raise RequestError(f"--json {file}: the folder {folder} does not exist")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise RequestError(f"--json {file}: it cannot be written")


@app.command("config")
@_reported
def show_config(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset or a YAML file.")],
    overrides: Overrides = None,
    flow: Annotated[
        str | None, typer.Option("--flow", metavar="FLOW", help="Look among this flow's presets first.")
    ] = None,
) -> None:
    """Print a configuration with everything filled in; what is printed can be fed back in."""
    if flow is not None and flow not in FLOWS:
        raise RequestError(f"there is no flow {flow!r}; {suggest(flow, FLOWS)}")
    import configs

    print(configs.dump(configs.load(name, overrides or (), flow=flow)), end="")


@app.command()
@_reported
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look for what is wrong with this installation and say how to mend it."""
    from infra import doctor as examination

    raise typer.Exit(examination.report(examination.examine(), as_json=as_json))


@app.command()
@_reported
def deliver() -> None:
    """Tell MLflow what earlier runs could not tell it because it was away; the next run does the same at its start."""
    from tasks.waiting import deliver_on_demand

    print(deliver_on_demand())


for _command in (stack_commands.up, stack_commands.status, stack_commands.logs, stack_commands.down):
    app.command()(_reported(_command))


@data_app.command("list")
@_reported
def list_data() -> None:
    """Show the data sets, what they need and which are prepared."""
    from deepzero_core.data import available
    from infra.home import home

    sources = available()
    width = max(len(source.name) for source in sources)
    for source in sources:
        print(f"{source.name:{width}}  {source.description} ({source.licence})")
        for path in _stores_of(source.name, home()):
            print(f"{'':{width}}  prepared in {path}")
        if source.needs:
            print(f"{'':{width}}  needs {source.needs}")


@data_app.command("prepare")
@_reported
def prepare_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A data set of `deepzero data list`.")],
    source: Annotated[
        Path | None, typer.Option("--source", metavar="PATH", help="Where the files lie: a folder, or an .npz file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Prepare it anew, also when it is there.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing files from their publisher.")] = False,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", min=1, metavar="PIXELS", help="Side that an image folder is resized to."),
    ] = None,
) -> None:
    """Turn a data set into a verified, memory-mapped store."""
    from deepzero_core.data import prepare
    from infra.home import home

    prepared = prepare(name, home=home(), source=source, force=force, download=download, image_size=image_size)
    manifest = prepared.manifest
    counts = ", ".join(f"{count:,} {split}" for split, count in manifest.counts.items())
    state = "written to" if prepared.written else "already in"
    print(f"{name}: {counts} images of {'x'.join(map(str, manifest.image_shape))}, {state} {prepared.path}")


@data_app.command("verify")
@_reported
def verify_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A prepared data set.")],
) -> None:
    """Compare every file of a prepared data set with its checksum."""
    from deepzero_core.data import prepared_stores, verify
    from infra.home import home

    for path in prepared_stores(name, home=home()):
        verify(path)
        print(f"{name}: every file is as it was written in {path}")


def _stores_of(name: str, base: Path) -> list[Path]:
    """The prepared stores of a data set; none is no mistake here."""
    from deepzero_core.data import prepared_stores

    try:
        return prepared_stores(name, home=base)
    except RequestError:
        return []


if __name__ == "__main__":
    main()
