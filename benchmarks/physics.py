"""Simulations beside exact solutions, conservation and the literature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Report
from simulators import wake
from simulators.validation import (
    boundary_flux,
    burgers_error,
    frequency,
    order,
    strouhal,
    strouhal_of_cylinder,
    without_blockage,
)

REYNOLDS = (100.0, 195.3)
STEPS, KEPT = 2400, 800
"""Of a wake: time to shed regularly, and what its frequency is taken from."""


@dataclass(frozen=True)
class Finding:
    """A measured quantity, what it should be, and whether it is."""

    case: str
    quantity: str
    found: float
    wanted: str
    holds: bool | None = None
    """None: nothing to compare with."""


def measure(cases: Sequence[str], report: Report) -> list[Finding]:
    return [finding for name in cases if name in CASES for finding in CASES[name](report)]


def _cole_hopf(report: Report) -> list[Finding]:
    report("Burgers against the Cole–Hopf solution")
    findings = []
    for what, runs, steps in (
        ("dx and dt together", [(16, 8), (32, 16), (64, 32), (96, 48)], [1 / 8, 1 / 16, 1 / 32, 1 / 48]),
        ("dx, at dt = 1/64", [(16, 64), (32, 64), (64, 64)], [1 / 16, 1 / 32, 1 / 64]),
        ("dt, at 128 cells", [(128, 2), (128, 4), (128, 8)], [1 / 2, 1 / 4, 1 / 8]),
    ):
        errors = [burgers_error(*run) for run in runs]
        slope = order(steps, errors)
        listed = ", ".join(f"{error:.2g}" for error in errors)
        wanted = "1 ± 0.1" if what.startswith("dx and") else "1, less what the other error is"
        holds = abs(slope - 1) <= 0.1 if what.startswith("dx and") else 0.7 <= slope <= 1.1
        findings.append(Finding("cole-hopf", f"order in {what} (errors {listed})", slope, wanted, holds))
    return findings


def _strouhal(report: Report) -> list[Finding]:
    findings = []
    for channel in (True, False):
        name = "channel" if channel else "set-up"
        report(f"wake on the reference grid, {name}: {STEPS} steps")
        simulator = wake.Wake(wake.REFERENCE, channel=channel)
        state, params = simulator.start(len(REYNOLDS)), {"reynolds": torch.tensor(REYNOLDS)}
        y, x = (round(place / wake.REFERENCE.spacing) for place in (wake.CENTRE[0] + 40, wake.CENTRE[1]))
        signal = []
        for _ in range(STEPS):
            state = simulator.step(state, params)
            signal.append(state["velocity_x"][:, y, x].tolist())
        findings += _conservation(name, simulator, state)
        for number, reynolds in enumerate(REYNOLDS):
            found = frequency([values[number] for values in signal[-KEPT:]], simulator.dt)
            found = strouhal(found, 2 * wake.RADIUS, wake.INFLOW)
            expected = strouhal_of_cylinder(reynolds)
            findings.append(_shedding(name, reynolds, found, expected, channel))
    return findings


def _shedding(name: str, reynolds: float, found: float, expected: float, channel: bool) -> Finding:
    if not channel:
        # Sides at constant pressure slow the flow around the disc: no measurements to compare with.
        return Finding(name, f"Strouhal number, Re {reynolds:g}", found, f"{expected:.3f} in an unbounded flow")
    free = without_blockage(found, 2 * wake.RADIUS / wake.SIZE[1])
    quantity = f"Strouhal number, Re {reynolds:g} (as measured: {found:.3f})"
    return Finding(name, quantity, free, f"{expected:.3f} ± 10 %", abs(free / expected - 1) <= 0.1)


def _conservation(name: str, simulator: wake.Wake, state: dict[str, torch.Tensor]) -> list[Finding]:
    divergence = simulator.projection.divergence(state["velocity_y"], state["velocity_x"]).abs().max().item()
    divergence *= wake.REFERENCE.spacing / wake.INFLOW
    inflow, net = boundary_flux(state, wake.REFERENCE.spacing)
    imbalance = (net.abs() / inflow).max().item()
    kept = (inflow / (wake.INFLOW * wake.SIZE[1])).min().item()
    return [
        Finding(name, "largest divergence, in U/dx", divergence, "< 1e-5 in float32", divergence < 1e-5),
        Finding(name, "net flux over the boundary, of the inflow", imbalance, "< 1e-5", imbalance < 1e-5),
        Finding(name, "inflow, of U times the width", kept, "1 ± 0.05", abs(kept - 1) <= 0.05),
    ]


CASES: dict[str, Callable[[Report], list[Finding]]] = {"cole-hopf": _cole_hopf, "strouhal": _strouhal}


def show(findings: Sequence[Finding]) -> None:
    table = Table(box=box.SIMPLE)
    for title in ("case", "quantity", "found", "wanted", ""):
        table.add_column(title, justify="right" if title == "found" else "left")
    words = {True: "holds", False: "does not hold", None: ""}
    for finding in findings:
        table.add_row(finding.case, finding.quantity, f"{finding.found:.3g}", finding.wanted, words[finding.holds])
    Console(width=140).print(table)
