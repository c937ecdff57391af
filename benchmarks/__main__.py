"""`python -m benchmarks`: the engine against its baselines, timed in the same run; `accuracy`: against the derivative;
`memory`: what an estimate needs beside a forward pass; `certification`: randomised smoothing against a plain loop;
`simulators`: advanced together beside PhiFlow's own step, and their physics; `faults`: runs that have things killed
around them, and what was lost; `orchestration`: what Prefect, MLflow and Dask cost beside the bare loop; `soak`: an
hour of training with flat memory; `load`: 100,000 metrics in one run, fifty runs in a queue; `scaling`: a step on 1 to
1,024 workers, simulated from measured costs; `slow-worker`: a step on workers of which one is ten times slower;
`fan-out`: a slow program on one worker and on two.

python -m benchmarks --case cnn5 --case vit --threads 2 --repeats 3 --precision float32,bfloat16
python -m benchmarks accuracy --plot docs/images/accuracy.png
python -m benchmarks memory --case dncnn17
python -m benchmarks certification --case digits --threads 1
python -m benchmarks simulators --case wake --case cole-hopf
python -m benchmarks faults --case mlflow --repeats 10
python -m benchmarks orchestration --steps 500
python -m benchmarks soak --minutes 60 --plot docs/images/soak.png
python -m benchmarks load --case metrics
python -m benchmarks scaling --case demo --case cnn5 --network 1.25e9
python -m benchmarks slow-worker --repeats 5
python -m benchmarks fan-out --case computing
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import (
    accuracy,
    certification,
    fan_out,
    load,
    memory,
    orchestration,
    physics,
    plot,
    scaling,
    simulators,
    slow_worker,
    soak,
)
from benchmarks.cases import CASES
from benchmarks.faults import table as faults
from benchmarks.faults.cases import CASES as FAULTS
from benchmarks.machine import load_average, machine
from benchmarks.measure import Options, measure
from benchmarks.results import Row, save
from benchmarks.table import show
from benchmarks.workers import measure_workers
from deepzero_core.errors import DeepZeroError, RequestError, WorkError, suggest
from deepzero_core.perturb.estimate import PRECISIONS
from infra.orchestration import configure
from tasks.environment import version

WORKERS = "workers"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured what the arguments ask for; 1: the engine disagrees with its baselines; 2: the request was wrong."""
    try:
        options = _parser().parse_args(arguments)
        _WHAT[options.what](options)
        return 0
    except DeepZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _speed(options: argparse.Namespace) -> None:
    cases, precisions = _known(options.case or [*CASES, WORKERS], [*CASES, WORKERS], "case"), _precisions(options)
    _set_up(options)
    settings = Options(options.repeats, precisions, options.device)
    facts = machine(options.threads, torch.device(settings.device))
    rows: list[Row] = []
    report = _Report()
    report(f"load {facts['load']} before the start: whatever else runs on this machine is timed too")
    for case in cases:
        rows += measure_workers(settings, report) if case == WORKERS else measure(CASES[case], settings, report)
        save(options.json, {"machine": facts, "rows": [row.document() for row in rows]})
    show(rows)
    wrong = [f"{row.case} ({row.precision})" for row in rows if not row.agrees]
    if wrong:
        raise WorkError(f"the engine disagrees with its baselines in float64: {', '.join(wrong)}")


def _accuracy(options: argparse.Namespace) -> None:
    _set_up(options)
    curves = accuracy.measure(_Report(), precisions=_precisions(options))
    facts = machine(options.threads, torch.device("cpu"))
    save(options.json, {"machine": facts, "curves": [dataclasses.asdict(curve) for curve in curves]})
    accuracy.show(curves)
    if options.plot:
        plot.draw(curves, options.plot)


def _memory(options: argparse.Namespace) -> None:
    cases = _known(options.case or list(CASES), list(CASES), "case")
    _set_up(options)
    facts = machine(options.threads, torch.device("cpu"))
    found = memory.measure(cases, options.threads, _Report())
    save(options.json, {"machine": facts, "peaks": [dataclasses.asdict(peaks) for peaks in found]})
    memory.show(found)


def _certification(options: argparse.Namespace) -> None:
    cases = _known(options.case or list(certification.CASES), list(certification.CASES), "case")
    _set_up(options)
    report, before = _Report(), load_average()
    report(f"load {before} before the start: whatever else runs on this machine is timed too")
    found = certification.measure(cases, options.repeats, report)
    # Not before: it loads the engine, which has the allocator keep freed memory, and a plain loop knows no engine.
    facts = machine(options.threads, torch.device("cpu")) | {"load": before}
    save(options.json, {"machine": facts, "certification": certification.documents(found)})
    certification.show(found)


def _simulators(options: argparse.Namespace) -> None:
    valid = [*simulators.CASES, *physics.CASES]
    cases = _known(options.case or valid, valid, "case")
    _set_up(options)
    report = _Report()
    facts = machine(options.threads, torch.device("cpu")) | {"phiflow": version("phiflow"), "phiml": version("phiml")}
    speeds = simulators.measure(cases, options.repeats, report)
    findings = physics.measure(cases, report)
    rows = [dataclasses.asdict(speed) | {"ratios": speed.ratios} for speed in speeds]
    physical = [dataclasses.asdict(finding) for finding in findings]
    save(options.json, {"machine": facts, "speed": rows, "physics": physical})
    simulators.show(speeds)
    physics.show(findings)
    wrong = [f"{finding.case}, {finding.quantity}" for finding in findings if finding.holds is False]
    if wrong:
        raise WorkError(f"the simulators are not what they should be: {'; '.join(wrong)}")


def _faults(options: argparse.Namespace) -> None:
    cases = _known(options.case or list(FAULTS), list(FAULTS), "case")
    _set_up(options)
    report = _Report()
    facts = machine(options.threads, torch.device("cpu"))
    rows = faults.measure(cases, options.repeats, report)
    save(options.json, {"machine": facts, "faults": faults.documents(rows)})
    print(faults.markdown(rows))
    if lost := [row.case for row in rows if row.lost]:
        raise WorkError(f"something was lost, or was not as it should be: {', '.join(lost)}")


def _orchestration(options: argparse.Namespace) -> None:
    _set_up(options)
    with _own_home():
        facts = machine(1, torch.device("cpu"))
        cost = orchestration.measure(options.steps, _Report())
    save(options.json, {"machine": facts, "orchestration": orchestration.document(cost)})
    orchestration.show(cost)
    if not cost.same_bits:
        raise WorkError("the two ways of training do not end with the same bits")
    if not cost.holds:
        raise WorkError(f"orchestration costs {cost.processor_share:.1%}, more than {orchestration.BAR:.0%}")


def _soak(options: argparse.Namespace) -> None:
    _set_up(options)
    with _own_home():
        facts = machine(1, torch.device("cpu"))
        found = soak.measure(options.minutes, _Report())
    save(options.json, {"machine": facts, "soak": soak.document(found)})
    soak.show(found)
    if options.plot:
        soak.draw(found, options.plot)
    if not found.flat:
        raise WorkError(f"memory grows: {', '.join(f'{name} {share:+.1%}' for name, share in found.growth.items())}")


def _load(options: argparse.Namespace) -> None:
    cases = _known(options.case or ["metrics", "queue"], ["metrics", "queue"], "case")
    _set_up(options)
    report = _Report()
    with _own_home():
        facts = machine(1, torch.device("cpu"))
        rows = [load.metrics() if case == "metrics" else load.queue(50, 4, report) for case in cases]
    save(options.json, {"machine": facts, "load": [dataclasses.asdict(row) for row in rows]})
    for row in rows:
        print(f"{row.what}: {row.seconds:.1f} s, lost: {row.lost or 'nothing'}")
    if lost := [row.what for row in rows if row.lost]:
        raise WorkError(f"something was lost: {'; '.join(lost)}")


@contextmanager
def _own_home() -> Iterator[None]:
    """State folders for one benchmark: what is measured is not what lies in the user's."""
    with tempfile.TemporaryDirectory(prefix="deepzero-benchmark-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"DEEPZERO_HOME": f"{folder}/home", "PREFECT_HOME": f"{folder}/prefect"}
        for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI"):
            os.environ.pop(name, None)
        configure()
        yield


def _scaling(options: argparse.Namespace) -> None:
    cases = _known(options.case or list(scaling.CASES), list(scaling.CASES), "case")
    _set_up(options)
    if not options.network > 0:
        raise RequestError("--network must be a positive number of bytes per second")
    report = _Report()
    facts = machine(1, torch.device("cpu"))
    report(f"load {facts['load']} before the start: whatever else runs on this machine is timed too")
    for costs, found in scaling.measure(cases, options.repeats, options.network, report):
        save(options.json, {"machine": facts, **scaling.document(costs, found)})
        scaling.show(costs, found)


def _slow_worker(options: argparse.Namespace) -> None:
    _set_up(options)
    facts = machine(1, torch.device("cpu"))
    found = slow_worker.measure(options.repeats, _Report())
    save(options.json, {"machine": facts, "slow_worker": dataclasses.asdict(found) | {"ratio": found.ratio}})
    slow_worker.show(found)


def _fan_out(options: argparse.Namespace) -> None:
    cases = _known(options.case or list(fan_out.CASES), list(fan_out.CASES), "case")
    _set_up(options)
    facts, report = machine(options.threads, torch.device("cpu")), _Report()
    report(f"load {facts['load']} before the start: whatever else runs on this machine is timed too")
    found = fan_out.measure(cases, options.repeats, report)
    rows = [dataclasses.asdict(shared) | {"ratios": shared.ratios} for shared in found]
    save(options.json, {"machine": facts, "fan-out": rows})
    fan_out.show(found)


_WHAT = {
    "speed": _speed,
    "accuracy": _accuracy,
    "memory": _memory,
    "certification": _certification,
    "simulators": _simulators,
    "faults": _faults,
    "orchestration": _orchestration,
    "soak": _soak,
    "load": _load,
    "scaling": _scaling,
    "slow-worker": _slow_worker,
    "fan-out": _fan_out,
}


class _Report:
    """Lines on the error stream: seconds since the start, and what is being timed."""

    def __init__(self) -> None:
        self._console, self._started = Console(stderr=True, width=120, highlight=False), time.perf_counter()

    def __call__(self, line: str) -> None:
        self._console.print(f"{time.perf_counter() - self._started:7.0f} s  {line}", markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=tuple(_WHAT), default="speed")
    parser.add_argument(
        "--case",
        action="append",
        help=f"one of {', '.join([*CASES, WORKERS])}; certification: {', '.join(certification.CASES)}; simulators: "
        f"{', '.join([*simulators.CASES, *physics.CASES])}; scaling: {', '.join(scaling.CASES)}; "
        f"fan-out: {', '.join(fan_out.CASES)}; faults: {', '.join(FAULTS)}; load: metrics, queue; "
        "may be repeated; all",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every contender; medians are shown")
    parser.add_argument(
        "--precision", help=f"of {', '.join(PRECISIONS)}, with commas; float32, for accuracy all of them"
    )
    parser.add_argument("--steps", type=int, default=500, help="orchestration only: steps of each way")
    parser.add_argument("--minutes", type=float, default=60.0, help="soak only: how long")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--json",
        type=Path,
        help="where the numbers go; benchmarks.json, benchmarks-accuracy.json, and so on",
    )
    parser.add_argument(
        "--network", type=float, default=scaling.NETWORK, help="scaling only: bytes per second between two machines"
    )
    parser.add_argument("--plot", type=Path, help="accuracy, soak: where the picture goes")
    return parser


def _precisions(options: argparse.Namespace) -> tuple[str, ...]:
    default = PRECISIONS if options.what == "accuracy" else ("float32",)
    return tuple(_known(options.precision.split(",") if options.precision else default, PRECISIONS, "precision"))


def _known(names: Sequence[str], valid: Sequence[str], what: str) -> Sequence[str]:
    for name in names:
        if name not in valid:
            raise RequestError(f"there is no {what} {name!r}: {suggest(name, valid)}")
    return names


def _set_up(options: argparse.Namespace) -> None:
    if options.threads < 1 or options.repeats < 1:
        raise RequestError("--threads and --repeats must be at least 1")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise RequestError(f"--device {options.device}: this machine has no CUDA device that torch can use")
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa cannot hold a difference at μ = 5e-3
    options.json = options.json or Path(
        "benchmarks.json" if options.what == "speed" else f"benchmarks-{options.what}.json"
    )


if __name__ == "__main__":
    sys.exit(main())
