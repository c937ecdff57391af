"""What the engine is measured against, written plainly.

feature_reuse   the paper's scheme: one forward pass per coordinate, from the cached input of the block that holds it
no_reuse        one forward pass of the whole network per coordinate
vmapped         torch.func: functional_call under vmap over copies of the parameter, a chunk of coordinates at once
torchzero       the finite differences of the torchzero package, on the coordinates as parameters of their own

Each takes a problem and μ, evaluates the base loss once, and returns slopes(coordinates): forward differences
[l(θ + μeᵢ) − l(θ)]/μ at flat indices, by parameter name, [P] each.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, replace_all_batch_norm_modules_, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.problem import Coordinates, Problem

Slopes = Callable[[Coordinates], dict[str, Tensor]]


@torch.no_grad()
def feature_reuse(problem: Problem, mu: float) -> Slopes:
    blocks = problem.blocks
    features = [problem.inputs]
    for block in blocks:
        features.append(block.run(features[-1]))
    base = problem.loss_fn(features[-1], problem.targets)

    def slopes(coordinates: Coordinates) -> dict[str, Tensor]:
        found = {}
        for name, indices in coordinates.items():
            first = problem.block_of(name)

            def loss(first: int = first) -> Tensor:
                outputs = features[first]
                for block in blocks[first:]:
                    outputs = block.run(outputs)
                return problem.loss_fn(outputs, problem.targets)

            found[name] = _differences(problem, name, indices, mu, base, loss)
        return found

    return slopes


@torch.no_grad()
def no_reuse(problem: Problem, mu: float) -> Slopes:
    def loss() -> Tensor:
        return problem.loss_fn(problem.module(problem.inputs), problem.targets)

    base = loss()
    return lambda coordinates: {
        name: _differences(problem, name, indices, mu, base, loss) for name, indices in coordinates.items()
    }


@torch.no_grad()
def _differences(
    problem: Problem, name: str, indices: Tensor, mu: float, base: Tensor, loss: Callable[[], Tensor]
) -> Tensor:
    flat = problem.module.get_parameter(name).view(-1)
    slopes = torch.empty(len(indices), dtype=flat.dtype, device=flat.device)
    for position, index in enumerate(indices):
        kept = flat[index].clone()
        flat[index] += mu
        slopes[position] = (loss() - base) / mu
        flat[index] = kept
    return slopes


@torch.no_grad()
def vmapped(problem: Problem, mu: float, chunk: int) -> Slopes:
    # vmap cannot write running statistics; in training mode no loss depends on them.
    module = replace_all_batch_norm_modules_(copy.deepcopy(problem.module))
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(moved: dict[str, Tensor]) -> Tensor:
        # The fused attention kernel of the CPU has no batched form and would run one copy after the other.
        with sdpa_kernel(SDPBackend.MATH):
            outputs = functional_call(module, parameters | moved, (problem.inputs,))
        return problem.loss_fn(outputs, problem.targets)

    base = loss({})

    @torch.no_grad()
    def slopes(coordinates: Coordinates) -> dict[str, Tensor]:
        found = {}
        for name, indices in coordinates.items():
            parameter = parameters[name]
            found[name] = parameter.new_empty(len(indices))
            for start in range(0, len(indices), chunk):
                some = indices[start : start + chunk]
                copies = parameter.expand(len(some), *parameter.shape).clone()
                copies.view(len(some), -1)[torch.arange(len(some), device=some.device), some] += mu
                found[name][start : start + chunk] = (vmap(loss)({name: copies}) - base) / mu
        return found

    return slopes


def torchzero(problem: Problem, mu: float) -> Slopes:
    """torchzero estimates whole parameters: the one it is given is a step from θ along the coordinates, [P], at zero.

    Raises:
        ImportError: the package is not installed.
    """
    from torchzero import Optimizer
    from torchzero.modules import FDM, LR

    @torch.no_grad()
    def along(name: str, indices: Tensor) -> Tensor:
        flat = problem.module.get_parameter(name).view(-1)
        kept = flat[indices].clone()
        step = torch.zeros_like(kept, requires_grad=True)

        @torch.no_grad()
        def loss(_backward: bool) -> Tensor:
            flat[indices] = kept + step
            return problem.loss_fn(problem.module(problem.inputs), problem.targets)

        Optimizer([step], FDM(h=mu, formula="forward"), LR(0.0)).step(loss)
        flat[indices] = kept
        assert step.grad is not None
        return step.grad

    return lambda coordinates: {name: along(name, indices) for name, indices in coordinates.items()}
