"""Relative error of an estimate ĝ over μ: ‖ĝ − g‖/‖g‖ over sampled coordinates of a layer's weight, the worst layer's.

    against float64 CGE     g = [l(θ + μeᵢ) − l(θ)]/μ in float64 at the same μ: what rounding costs
    against autograd        g = ∂l/∂θᵢ in float64: rounding, and the bias O(μ) of the difference itself

on the paper's CNN with BatchNorm in training mode, for one forward pass per coordinate in float32 (the paper's way) and
the engine at each precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.bars import AGAINST_CGE, AGAINST_DERIVATIVE, Bar
from benchmarks.cases import classification, cnn
from benchmarks.measure import MU, Report, engine, relative_error
from benchmarks.models import cut_sequential
from benchmarks.problem import Coordinates, Problem, evenly
from deepzero_core import first_order, reference
from deepzero_core.perturb import prepare
from deepzero_core.sparsity import maskable_parameters

MUS = (1e-1, 3e-2, 1e-2, MU, 1e-3, 1e-4, 1e-5, 1e-6)
PER_LAYER = 24
EXACT, PAPER = "float64", "paper"


@dataclass(frozen=True)
class Curve:
    """Relative errors at each μ. name: a precision of the engine, PAPER, or EXACT: the difference's own bias."""

    name: str
    mus: tuple[float, ...]
    against_cge: tuple[float, ...]
    against_derivative: tuple[float, ...]


def measure(
    report: Report,
    *,
    precisions: Sequence[str],
    mus: Sequence[float] = MUS,
    depth: int = 2,
    batch: int = 128,
    per_layer: int = PER_LAYER,
) -> list[Curve]:
    """The curves of float64 CGE, the paper's way and every precision, in this order."""
    problem = classification(lambda: cnn(depth), cut_sequential, batch)
    double = problem.to(torch.float64)
    sizes = {name: problem.module.get_parameter(name).numel() for name in maskable_parameters(problem.module)}
    coordinates = {name: evenly(torch.arange(size), per_layer) for name, size in sizes.items()}
    derivative = first_order(double.module, double.inputs, double.targets, double.loss_fn).gradients
    exact = {name: derivative[name].flatten()[indices] for name, indices in coordinates.items()}
    evaluator = prepare(problem.module, problem.inputs, problem.targets, problem.loss_fn)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (EXACT, PAPER, *precisions)}
    for mu in mus:
        report(f"accuracy: μ = {mu:g}")
        slopes = {EXACT: _separate(double, mu, coordinates), PAPER: _separate(problem, mu, coordinates)}
        slopes |= {name: engine(problem, mu, name, evaluator)(coordinates) for name in precisions}
        for name, own in slopes.items():
            found[name].append((_worst(own, slopes[EXACT]), _worst(own, exact)))
    return [Curve(name, tuple(mus), *map(tuple, zip(*errors, strict=True))) for name, errors in found.items()]


def _worst(found: Coordinates, exact: Coordinates) -> float:
    return max(relative_error({name: found[name]}, {name: exact[name]}) for name in exact)


def _separate(problem: Problem, mu: float, coordinates: Coordinates) -> dict[str, Tensor]:
    """One forward pass per coordinate."""
    estimate = reference.cge(
        problem.module, problem.inputs, problem.targets, problem.loss_fn, mu=mu, coordinates=coordinates
    )
    return {name: estimate.gradients[name].flatten()[indices] for name, indices in coordinates.items()}


def show(curves: Sequence[Curve]) -> None:
    """Print both errors at every μ, and the bars."""
    console = Console(width=150)
    table = Table("μ", *(curve.name for curve in curves), box=box.SIMPLE_HEAD, caption="against float64 CGE / autograd")
    for position, mu in enumerate(curves[0].mus):
        table.add_row(
            f"{mu:g}",
            *(f"{curve.against_cge[position]:.1e} / {curve.against_derivative[position]:.1e}" for curve in curves),
        )
    console.print(table)
    for curve in curves:
        for line in verdicts(curve):
            console.print(line, markup=False)


def verdicts(curve: Curve) -> list[str]:
    """The bars of one curve, at the μ they are set for."""
    bars: list[tuple[str, float, dict[str, Bar], tuple[float, ...]]] = [
        ("float64 CGE", MU, AGAINST_CGE, curve.against_cge),
        ("autograd", min(MUS), AGAINST_DERIVATIVE, curve.against_derivative),
    ]
    lines = []
    for against, mu, known, errors in bars:
        if curve.name in known and mu in curve.mus:
            error = errors[curve.mus.index(mu)]
            lines.append(
                f"{curve.name} against {against} at μ = {mu:g}: {error:.1e} ({known[curve.name].verdict(error)})"
            )
    return lines
