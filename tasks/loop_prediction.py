"""What the training of a corrector will take: one step of every method, timed on this machine.

Reference runs are not there beforehand. In their place the coarse solver runs from where references begin: what a step
costs does not depend on the values. A step that spends many queries is timed with few and with some more, and
continued in a straight line; a loop of another length in proportion.
"""

import time

import torch
from torch import Tensor, nn

from configs.solver_loop import ASKING, PHIFLOW, LoopMethod, SolverLoop
from deepzero_core.training.sources import Batch, Coordinates, GradientSource
from simulators import methods
from simulators.cases import Case, burgers_cases, wake_cases
from simulators.methods.windows import Windows
from simulators.protocol import Simulator
from tasks.couple import gradient_source
from tasks.loop_problem import corrector_of, coupling_of, open_simulator, source_grid

_FEW, _MORE = 2, 6
"""Queries that are timed."""


def training_seconds(loop: SolverLoop) -> dict[str, float]:
    """By method, of one seed, without pre-training; nothing for your own simulator, which is asked about nothing."""
    if loop.simulator.kind not in PHIFLOW:
        return {}
    threads = torch.get_num_threads()
    torch.set_num_threads(loop.training.threads)
    try:
        with open_simulator(loop) as simulator:
            bench = _Bench(loop, simulator)
            return {method: bench.seconds(method) for method in loop.methods if method != "src"}
    finally:
        torch.set_num_threads(threads)


class _Bench:
    """The longest loop with a corrector and a batch to try it on."""

    def __init__(self, loop: SolverLoop, simulator: Simulator) -> None:
        self.loop = loop
        cases = _stand_ins(loop)
        coupling = coupling_of(loop, cases)
        self.unrolled = methods.Loop(simulator, coupling, loop.longest, loop.training.penalty)
        some = [{name: value[:1] for name, value in fields.items()} for fields in (cases[0].frames, cases[0].params)]
        self.module = corrector_of(loop, coupling.features(*some), len(coupling.scales.image), 0)
        windows = Windows(self.unrolled, cases)
        self.batch = windows.batch(range(loop.training.batch_size))
        self.pairs = tuple(value[: loop.training.batch_size] for value in windows.pairs())

    def seconds(self, method: LoopMethod) -> float:
        """Of all steps of a training."""
        training = self.loop.training
        if method == "non":
            return training.steps * _timed(methods.NonInteractive(self.unrolled), self.module, *self.pairs)
        if method in ASKING:
            few, more = (self._step(method, queries) for queries in (_FEW, _MORE))
            spent = min(training.queries, self._most(method))
            step = few + max(0.0, more - few) * (spent - _FEW) / (_MORE - _FEW)
        else:
            step = self._step(method, training.queries)
        return step * sum(steps * unroll for steps, unroll in self.loop.stages) / self.loop.longest

    def _most(self, method: LoopMethod) -> int:
        """Queries beyond which the method has no use for more."""
        if method == "sol-zo":
            return 1 + sum(parameter.numel() for parameter in self.module.parameters())
        return 1 + self.unrolled.packed.state.size

    def _step(self, method: LoopMethod, queries: int) -> float:
        fewer = self.loop.training.model_copy(update={"queries": queries})
        source = gradient_source(self.loop.model_copy(update={"training": fewer}), method, 0)(self.unrolled)
        coordinates = _spread_out(self.module, queries - 1) if method == "sol-zo" else None
        return _timed(source, self.module, *self.batch, coordinates=coordinates)


def _stand_ins(loop: SolverLoop) -> list[Case]:
    """Cases of the coarse solver itself, as long as the longest loop."""
    config, count, frames = loop.simulator, loop.training.batch_size, loop.longest + 1
    grid = source_grid(config)
    if config.kind == "burgers":
        return burgers_cases(
            range(count),
            reference=grid,
            factor=1,
            skip=0,
            frames=frames,
            dt=config.dt,
            viscosity=config.viscosity,
        )
    numbers = [loop.cases.train[number % len(loop.cases.train)] for number in range(count)]
    return wake_cases(numbers, reference=grid, factor=1, skip=0, frames=frames, marker=False)


def _spread_out(module: nn.Module, count: int) -> Coordinates:
    """So many coordinates at equal distances over all parameters, or all where there are no more."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    total = sum(sizes.values())
    chosen = torch.arange(min(count, total)) * total // min(count, total)
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = chosen[(chosen >= start) & (chosen < start + size)] - start
        start += size
    return {name: indices for name, indices in found.items() if len(indices)}


def _timed(
    source: GradientSource,
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    coordinates: Coordinates | None = None,
) -> float:
    """Seconds of processor time of an estimate, once everything that is built for the first one is there."""
    # Not by the clock: what else the machine is doing would be taken for the cost of the method.
    batch = Batch.of(0, 0, 0, inputs, targets)
    source.estimate(module, batch, coordinates)
    started = time.process_time()
    source.estimate(module, batch, coordinates)
    return (time.process_time() - started) / torch.get_num_threads()
