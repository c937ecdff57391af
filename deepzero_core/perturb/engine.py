"""The traced evaluator: differences carried through the graph, from the perturbed parameter to the loss.

The structure of forward-mode differentiation with exact differences in place of tangents. The base pass caches every
value; a perturbation then visits only the nodes downstream of its parameter, and each visit asks the operator's rule
for the change of the result given the changes of the operands.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from deepzero_core.perturb.base_values import BaseValues, bases
from deepzero_core.perturb.changes import Change, OneHot, dense, take
from deepzero_core.perturb.cost import Cost, stretch, work
from deepzero_core.perturb.evaluator import BasePass, Chunk, Situation
from deepzero_core.perturb.machine import full_float32
from deepzero_core.perturb.objective import RandomState
from deepzero_core.perturb.regions import Entry, Region, entry_of, plan
from deepzero_core.perturb.rules import Call, general
from deepzero_core.perturb.rules.elementwise import rule_for
from deepzero_core.perturb.rules.general import operand_bytes
from deepzero_core.perturb.trace import Trace

K = TypeVar("K")
V = TypeVar("V")

_MAX_CHUNK = 4096
_CHUNK_FLOPS = 4e9
"""Operations of a region in one call of the kernels: tenths of a second, in which no signal is handled."""


@dataclass(frozen=True)
class _Cache:
    """What the base pass leaves behind: every node's value, and what later visits make of them for one another."""

    values: BaseValues
    arguments: dict[Node, tuple[Any, Any]] = field(default_factory=dict)
    """By node: its arguments with values in place of nodes."""
    kept: dict[Node, dict[str, Any]] = field(default_factory=dict)
    """By node: see `Call.once`."""
    own: dict[str, dict[Node, dict[str, Any]]] = field(default_factory=dict)
    """Of the parameter that is perturbed at present, by node: see `Call.once_for_parameter`."""
    regions: dict[str, dict[tuple[Entry, bool], Region | None]] = field(default_factory=dict)
    """Of the parameter that is perturbed at present, by entry and whether products are rounded to bfloat16."""
    packed: dict[Any, Tensor] = field(default_factory=dict)
    """What the kernels read, for all regions."""

    def of(self, node: Node) -> tuple[Any, Any]:
        if node not in self.arguments:
            self.arguments[node] = bases(node.args, self.values), bases(node.kwargs, self.values)
        return self.arguments[node]

    def own_of(self, name: str) -> dict[Node, dict[str, Any]]:
        return _only(self.own, name)

    def regions_of(self, name: str) -> dict[tuple[Entry, bool], Region | None]:
        return _only(self.regions, name)


def _only(by_parameter: dict[str, dict[K, V]], name: str) -> dict[K, V]:
    """A parameter's entry, after those of all others are given up."""
    if name not in by_parameter:
        by_parameter.clear()
    return by_parameter.setdefault(name, {})


@dataclass
class _Probe:
    """What one perturbation's walk holds at its peak, and what it costs, by stretch."""

    peak: int = 0
    costs: dict[str, Cost] = field(default_factory=dict)
    region_flops: float = 0.0
    visits: int = 0
    """Operators that answer, and regions."""

    def see(self, call: Call, change: Any, live: Mapping[Node, Any], passing: int) -> None:
        self.visits += 1
        self._spend(stretch(call, change), work(call, change))
        self.peak = max(self.peak, passing + _bytes([change, *live.values()]))

    def see_region(self, region: Region, live: Mapping[Node, Any]) -> None:
        self.visits += 1
        for where, cost in region.costs.items():
            self._spend(where, cost)
            self.region_flops += cost.flops
        self.peak = max(self.peak, region.bytes + _bytes(live.values()))

    def _spend(self, where: str, cost: Cost) -> None:
        self.costs[where] = self.costs.get(where, Cost()) + cost


class TracedEvaluator:
    """Evaluates perturbations on a trace. See `Evaluator`."""

    untraced: str | None = None

    def __init__(self, trace: Trace, situation: Situation) -> None:
        self.situation = situation
        self._trace = trace
        self._probes: dict[str, _Probe] = {}
        self._last_read = _last_uses(trace.nodes)
        self._last_use = {name: _last_uses(nodes) for name, nodes in trace.reads.items()}
        self._results_read = {node: trace.results_read(node) for nodes in trace.reads.values() for node in nodes}

    def base(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> BasePass:
        state = RandomState()
        feeds = iter([*parameters.values(), *buffers.values(), inputs, targets])
        values = BaseValues()
        results: tuple[Any, ...] = ()
        with torch.no_grad(), full_float32(inputs.device):
            for node in self._trace.nodes:
                if node.op == "placeholder":
                    values[node] = next(feeds)
                elif node.op == "get_attr":
                    values[node] = _attribute(self._trace.graph, str(node.target))
                elif node.op == "output":
                    results = bases(node.args, values)[0]
                else:
                    assert callable(node.target)
                    values[node] = node.target(*bases(node.args, values), **bases(node.kwargs, values))
                for read in self._last_read.get(node, ()):
                    values.release(read)
        return BasePass(*self._trace.unflatten(results), parameters, _Cache(values), state)

    def coordinates(self, base: BasePass, chunk: Chunk, step: float, precision: str = "float32") -> Tensor:
        return self._walk(base, chunk, step, precision)

    def chunk_size(self, base: BasePass, name: str, memory: int) -> int:
        """From the peak of one perturbation's own walk; measured once, in bytes, so that it is the same everywhere."""
        probe = self._probe(base, name)
        sizes = [memory // max(1, probe.peak), int(_CHUNK_FLOPS / max(1.0, probe.region_flops)), _MAX_CHUNK]
        return max(1, min(sizes))

    def cost(self, base: BasePass, name: str) -> dict[str, Cost]:
        return dict(self._probe(base, name).costs)

    def starts(self, base: BasePass, name: str, chunks: int) -> int:
        """Operators and regions that every chunk visits; and each node once, for what is made for all chunks."""
        return chunks * self._probe(base, name).visits + len(self._trace.reads[name])

    def _probe(self, base: BasePass, name: str) -> _Probe:
        if name not in self._probes:
            chunk = Chunk(name, torch.zeros(1, dtype=torch.long, device=base.parameters[name].device))
            probe = _Probe()
            # A step of 0: any other could leave the domain of an operator (a Cholesky factor) and raise.
            self._walk(base, chunk, 0.0, probe=probe)
            self._probes[name] = probe
        return self._probes[name]

    def _walk(
        self, base: BasePass, chunk: Chunk, step: float, precision: str = "float32", probe: _Probe | None = None
    ) -> Tensor:
        """Carry a step along every coordinate of the chunk to the loss."""
        trace, count = self._trace, len(chunk.indices)
        last_use = self._last_use[chunk.name]
        source = OneHot(chunk.indices, base.parameters[chunk.name].new_full([count], step))
        live: dict[Node, Any] = {trace.parameters[chunk.name]: source}
        done: set[Node] = set()
        with torch.no_grad(), full_float32(base.loss.device):
            for node in trace.reads[chunk.name]:
                if node not in done:
                    region = self._region(node, base.cache, live, chunk.name, precision)
                    if region is None:
                        change = self._change_of(node, base.cache, live, chunk, precision, probe)
                        live[node] = _as_values(change, base.cache.values[node]) if precision == "value" else change
                    else:
                        if probe is not None:
                            probe.see_region(region, live)
                        live |= region.run(live[region.entry.operand])
                        done |= region.nodes
                for used in last_use.get(node, ()):
                    live.pop(used, None)
        found = live.get(trace.loss)
        return base.loss.new_zeros(count) if found is None else dense(found, base.loss.shape)

    def _region(self, node: Node, base: _Cache, live: dict[Node, Any], name: str, precision: str) -> Region | None:
        """The region that begins at this node, if one does."""
        entry = entry_of(node, live) if precision != "value" else None
        if entry is None:
            return None
        regions, bfloat16 = base.regions_of(name), precision == "bfloat16"
        if (entry, bfloat16) not in regions:
            changed = (self._trace.parameters[name], *self._trace.reads[name])
            regions[entry, bfloat16] = plan(
                entry, changed, self._trace.needed, self._results_read, base.values, base.packed, bfloat16
            )
        return regions[entry, bfloat16]

    def _change_of(
        self, node: Node, base: _Cache, live: dict[Node, Any], chunk: Chunk, precision: str, probe: _Probe | None
    ) -> Any:
        """The change of one node's value, from those of its operands; None where nothing moves."""
        changes = tuple(_operand_changes(argument, live) for argument in node.args)
        if node.target is operator.getitem:
            parts, index = changes[0], cast(int, node.args[1])
            return parts[index] if isinstance(parts, (tuple, list)) else None
        if all(change is None or (isinstance(change, list) and not any(change)) for change in changes):
            return None
        name, count = chunk.name, len(chunk.indices)
        args, kwargs = base.of(node)
        kept, own = base.kept.setdefault(node, {}), base.own_of(name).setdefault(node, {})
        read = self._results_read[node]
        call = Call(node.target, args, kwargs, changes, base.values[node], count, read, kept, own, precision)
        rule = rule_for(node.target)
        change = rule(call) if rule is not None else None
        passing = 0
        if change is None:
            change, passing = general(call), operand_bytes(call)
        if probe is not None:
            probe.see(call, change, live, passing)
        return change


def _as_values(change: Any, base: Any) -> Any:
    """The change that is left when y + δ is kept in place of δ: its rounding is relative to y.

    Means over the whole batch are excepted: the difference of two of them is taken as the mean of the differences.
    """
    if isinstance(change, tuple):
        return tuple(_as_values(part, value) for part, value in zip(change, base, strict=True))
    if not isinstance(change, Change) or base.ndim == 0:
        return change
    value = take(base, change.block, change.width if change.block else 0)
    return Change((value + change.delta) - value, change.block)


def _operand_changes(argument: Any, live: dict[Node, Any]) -> Any:
    if isinstance(argument, Node):
        return live.get(argument)
    if isinstance(argument, (list, tuple)) and any(isinstance(item, Node) for item in argument):
        return [live.get(item) if isinstance(item, Node) else None for item in argument]
    return None


def _last_uses(nodes: tuple[Node, ...]) -> dict[Node, list[Node]]:
    """After which node which values are read no more."""
    last: dict[Node, Node] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            last[operand] = node
    by_user: dict[Node, list[Node]] = {}
    for operand, user in last.items():
        by_user.setdefault(user, []).append(operand)
    return by_user


def _bytes(changes: Iterable[Any]) -> int:
    """What changes hold; those that are views of the same memory hold it once."""
    parts = [part for change in changes for part in (change if isinstance(change, tuple) else (change,))]
    tensors = [getattr(part, "delta", getattr(part, "value", None)) for part in parts]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _attribute(graph: torch.nn.Module, path: str) -> Any:
    value: Any = graph
    for part in path.split("."):
        value = getattr(value, part)
    return value
