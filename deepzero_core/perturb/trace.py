"""The module and its loss as one graph of ATen operators, without mutation: what the rules are written for."""

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from deepzero_core.errors import BlackBoxError
from deepzero_core.perturb.objective import LossFn, objective, preserved_random_state
from deepzero_core.perturb.rewriting import rewrite

# `native_batch_norm` overwrites the running statistics it is given. `objective` gives it clones, which the graph then
# returns: inside the graph nobody else reads them, so the base pass is right, and no rule ever runs the operator again.
_OVERWRITES_ONLY_CLONES = {torch.ops.aten.native_batch_norm.default}

# The result depends on the operand's shape and type only: a change of its values ends here.
_SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
_SHAPE_ONLY |= {"new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "sym_size", "size"}


class UntraceableError(Exception):
    """The module cannot be written as one graph; the message says why."""


@dataclass(frozen=True)
class Trace:
    """The graph, and which of its nodes is what."""

    graph: GraphModule
    nodes: tuple[Node, ...]
    parameters: dict[str, Node]
    loss: Node
    reads: dict[str, tuple[Node, ...]]
    """By parameter: the nodes that change when it does and that the loss depends on, in order of evaluation."""
    needed: frozenset[Node]
    """What the loss depends on."""
    structure: TreeSpec

    def results_read(self, node: Node) -> frozenset[int]:
        """Of an operator with several results: the positions that the loss depends on."""
        readers = [user for user in node.users if user.target is operator.getitem and user in self.needed]
        return frozenset(cast(int, user.args[1]) for user in readers)

    def unflatten(self, results: tuple[Any, ...]) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """What the graph returns as (loss, outputs, buffers)."""
        loss, outputs, buffers = tree_unflatten(results, self.structure)
        return loss, outputs, buffers


def trace(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
) -> Trace:
    """Trace loss, outputs and new buffers as a function of (parameters, buffers, inputs, targets).

    Python control flow is fixed at its present outcome, which is why a trace holds for one set of shapes and modes.

    Raises:
        UntraceableError: control flow on tensor values, non-torch code, random operators fed by a parameter.
    """

    def evaluate(p: list[Tensor], b: list[Tensor], x: Tensor, t: Tensor) -> tuple[Any, ...]:
        named = dict(zip(parameters, p, strict=True))
        evaluation = objective(module, named, dict(zip(buffers, b, strict=True)), x, t, loss_fn)
        leaves, structure = tree_flatten((evaluation.loss, evaluation.outputs, evaluation.buffers))
        structures.append(structure)
        return tuple(leaves)

    structures: list[TreeSpec] = []
    arguments = (list(parameters.values()), list(buffers.values()), inputs, targets)
    with torch.no_grad(), preserved_random_state(), _plain_operators(), kept_attributes(module):
        try:
            # Traced twice: composite operators hide in-place writes (circular padding, `z[1:] += y`) from the first
            # pass, and only a graph of plain operators can be functionalised completely.
            # Fake tensors have no values: code that leaves torch (`.numpy()`, `.item()`) fails instead of being frozen.
            composite = make_fx(evaluate, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
            graph = make_fx(functionalize(_lifted(composite)))(*arguments)
            rewrite(graph)
        except BlackBoxError:
            raise
        except Exception as error:
            # Tracing runs the user's code on stand-ins and can fail in any way that code can. Nothing is lost: the
            # caller evaluates the module itself, pass by pass, and a true error in it shows there.
            reason = str(error).strip() or type(error).__name__
            raise UntraceableError(reason.splitlines()[0]) from error
    return _describe(graph, tuple(parameters), structures[0])


def _lifted(graph: GraphModule) -> GraphModule:
    """Copy the tensors that the module captured, such as an attention mask, so that what is made of them is traced as
    everything else is: functionalisation does not see writes into anything that hangs on a bare constant."""
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and isinstance(getattr(graph, str(node.target), None), Tensor):
            with graph.graph.inserting_after(node):
                copy = graph.graph.call_function(torch.ops.aten.lift_fresh_copy.default, (node,))
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    graph.recompile()
    return graph


@contextmanager
def kept_attributes(module: nn.Module) -> Iterator[None]:
    """Give back the plain attributes that a forward pass rebinds: none may keep a stand-in without values."""
    before = {part: dict(vars(part)) for part in module.modules()}
    try:
        yield
    finally:
        for part, attributes in before.items():
            vars(part).clear()
            vars(part).update(attributes)


@contextmanager
def _plain_operators() -> Iterator[None]:
    """Trace attention as products and a softmax, BatchNorm and recurrent layers as one operator on every device: fused
    kernels have no rules, and some carry random state. What the graph's convolutions run on is decided when it runs."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            # Not `flags`, which sets the precision of a device that may be missing as well, and warns.
            onednn, *_ = torch.backends.mkldnn.set_flags(_enabled=False)
            try:
                yield
            finally:
                torch.backends.mkldnn.set_flags(_enabled=onednn)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _describe(graph: GraphModule, names: tuple[str, ...], structure: TreeSpec) -> Trace:
    nodes = tuple(graph.graph.nodes)
    _refuse_mutation(nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    parameters = dict(zip(names, placeholders, strict=False))
    results = next(node for node in nodes if node.op == "output").args[0]
    assert isinstance(results, (list, tuple))
    loss = results[0]
    if not isinstance(loss, Node):
        raise UntraceableError("the loss does not depend on the module's outputs")
    needed = _ancestors(loss)
    reads = {name: _downstream(node, nodes, needed) for name, node in parameters.items()}
    for name, changed in reads.items():
        _refuse_dependence_on_values(changed, {parameters[name], *changed})
    for node in nodes:
        if node.target is torch.ops.aten.bernoulli.p:
            node.target = _bernoulli
    return Trace(graph, nodes, parameters, loss, reads, frozenset(needed), structure)


def _bernoulli(like: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Tensor:
    """`bernoulli_`, as dropout calls it, in memory order: the operator without mutation draws in order of the axes, so
    that a transposed activation would be dropped elsewhere than in the module."""
    return torch.empty_like(like).bernoulli_(p, generator=generator)


def _refuse_mutation(nodes: tuple[Node, ...]) -> None:
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.target not in _OVERWRITES_ONLY_CLONES:
            raise UntraceableError(f"{node.target} writes in place and could not be functionalised")


def _refuse_dependence_on_values(nodes: tuple[Node, ...], changed: set[Node]) -> None:
    """Operators whose random numbers or result shape hang on perturbed values: one graph cannot stand for them all."""
    for node in nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise UntraceableError(f"{node.target} draws random numbers from a perturbed value")
        if any(operand in changed for operand in _listed(list(node.kwargs.values()))):
            raise UntraceableError(f"{node.target} takes a perturbed value by keyword")
        indexes_with_fixed = node.target is torch.ops.aten.index.Tensor and not any(
            index in changed for index in _listed(node.args[1])
        )
        if torch.Tag.dynamic_output_shape in tags and not indexes_with_fixed:
            raise UntraceableError(f"the shape of what {node.target} returns depends on a perturbed value")


def _listed(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, (list, tuple)) else [argument]


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found


def _downstream(source: Node, nodes: tuple[Node, ...], needed: set[Node]) -> tuple[Node, ...]:
    changed = {source}
    ordered = []
    for node in nodes:
        depends = any(operand in changed for operand in node.all_input_nodes)
        if depends and node in needed and _operator_name(node) not in _SHAPE_ONLY:
            changed.add(node)
            ordered.append(node)
    return tuple(ordered)


def _operator_name(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else ""
