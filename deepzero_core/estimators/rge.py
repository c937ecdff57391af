"""Randomised gradient estimation (RGE).

    forward:   ĝ = (1/q) Σₖ [l(θ + μuₖ) − l(θ)]/μ · uₖ,           uₖ ~ N(0, I)
    central:   ĝ = (1/q) Σₖ [l(θ + μuₖ) − l(θ − μuₖ)]/2μ · uₖ     the antithetic pair (u, −u)

Unbiased for the gradient of the smoothed loss; variance O(d/q). A direction is a seed: it is drawn when its chunk is
evaluated and gone afterwards, and whoever has the seed can draw it again.
Source: Nesterov and Spokoiny 2017; as used in DeepZero (Chen et al., ICLR 2024).

A direction moves every parameter, so that no feature can be reused: a query is a forward pass. What can be saved is the
cost of starting each operator, by `torch.vmap` over several directions. The price is that weights differ by example,
which turns a convolution into one with groups. Milliseconds per query on one core (AMD EPYC, torch 2.13):

    network               batch   one by one   2 at once      4      8     16     32
    CNN, 8×8 images           8         0.61        0.75   0.44   0.25   0.22   0.17
    CNN, 8×8                128          2.8         3.1    2.8    2.8
    CNN, 32×32                8          2.8         4.2    3.6    2.4    2.7    2.7
    CNN, 32×32               32          9.3         9.8    9.9     10     14     20
    CNN, 32×32              128           34          44     56     65
    MLP, 9,000 weights      128         0.26        0.40   0.23   0.15   0.13   0.13
    MLP, 411,000 weights    128          2.1         2.1    1.9    1.8    1.8    2.9
    MLP, 411,000 weights      8         0.73         1.4    1.0    0.9    1.0    2.5
    transformer, 32×32        8          3.5         5.9    5.1    4.8    4.7    4.6
    transformer, 32×32      128           38          48     50     61
    ResNet-20, 32×32          8           15          16     14     14     14     14

On a CPU directions are therefore evaluated together where at least four fit into its cache, and one by one otherwise;
everywhere one by one where the pass draws random numbers, so that all see the same.

The two losses cancel. Where `loss_fn` returns one loss per example their mean is taken in float64, and only the
rounding of the forward pass is left. Relative error of the slope in float32 against the same in float64, root mean
square of 24 directions:

    network                  batch   μ = 5e-3: mean   per example     μ = 1e-4: mean   per example
    CNN, 8×8 images            128          2.4e-5        2.9e-6             1.2e-3        1.8e-4
    MLP, 9,000 weights         128          1.9e-4        1.5e-5             7.1e-3        5.0e-4
    MLP, 411,000 weights       128          4.0e-5        2.2e-6             2.1e-3        1.3e-4
    transformer, 32×32           8          2.4e-5        6.2e-6             1.6e-3        5.0e-4
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepzero_core.estimators.cge import queries as spent
from deepzero_core.perturb.estimate import GradientEstimate, check_arguments, check_queries
from deepzero_core.perturb.objective import LossFn, RandomState, objective, preserved_random_state, state_of
from deepzero_core.perturb.reference import gaussian, seeds
from deepzero_core.perturb.rules.general import quiet_fallback
from deepzero_core.perturb.trace import kept_attributes

DEFAULT_MEMORY = 256 << 20
"""Bytes that the directions evaluated at once may take, where they do not have to fit into a CPU's cache."""

_CACHE = 2 << 20
_LEAST = 4
_MOST = 64


def rge(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *,
    queries: int,
    mu: float = 5e-3,
    generator: torch.Generator,
    difference: str = "forward",
    memory: int = DEFAULT_MEMORY,
) -> GradientEstimate:
    """Estimate the gradient from `queries` random directions over all trainable parameters.

    The directions are the generator's alone. A module that cannot be evaluated for several directions at once is
    evaluated for one after the other. Arguments and guarantees otherwise as in `cge`.

    Raises:
        RequestError: queries < 1, mu ≤ 0, unknown difference.
    Warns:
        UserWarning: the module was to be evaluated for several directions at once and cannot be; says why.
    """
    check_arguments(mu, difference)
    check_queries(queries)
    theta, buffers = state_of(module)
    moving = {name: theta[name] for name, parameter in module.named_parameters() if parameter.requires_grad}
    random_state = RandomState()

    def exact_loss(outputs: Any, wanted: Tensor) -> Tensor:
        return loss_fn(outputs, wanted).double()

    with torch.no_grad(), _Peak() as peak:
        base = objective(module, theta, buffers, inputs, targets, exact_loss)
    losses = _Losses(module, theta, buffers, inputs, targets, exact_loss, random_state)
    chosen = seeds(queries, generator)
    # Dropout draws in the order of memory, which is another one where directions lie side by side.
    size = 1 if _have_moved(random_state) else _at_once(peak.bytes, moving, inputs.device, memory)
    gradients = {name: torch.zeros_like(value) for name, value in theta.items()}
    for first in range(0, queries, size):
        drawn = [gaussian(moving, seed, generator.device) for seed in chosen[first : first + size]]
        directions = {
            name: torch.stack([u[name] for u in drawn]) if size > 1 else drawn[0][name][None] for name in moving
        }
        change = losses.at(directions, mu, len(drawn)) - (
            losses.at(directions, -mu, len(drawn)) if difference == "central" else base.loss
        )
        weights = change / (2 * mu if difference == "central" else mu) / queries
        for name, u in directions.items():
            gradients[name] += torch.tensordot(weights.to(u), u, 1)
    return GradientEstimate(gradients, spent(queries, difference), base.loss.item(), base.outputs, base.buffers)


def _have_moved(state: RandomState) -> bool:
    """Whether random numbers have been drawn since."""
    now = RandomState()
    return not all(map(torch.equal, [state.cpu, *state.cuda], [now.cpu, *now.cuda]))


def _at_once(peak: int, moving: Mapping[str, Tensor], device: torch.device, memory: int) -> int:
    """How many directions are evaluated together; see the table above. The direction, θ + μu and its copy are held."""
    each = peak + 3 * sum(value.numel() * value.element_size() for value in moving.values())
    size = min(_MOST, (min(memory, _CACHE) if device.type == "cpu" else memory) // max(each, 1))
    return size if size >= _LEAST and moving else 1


class _Peak(TorchDispatchMode):
    """The bytes that the largest operator of a pass reads and writes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own carries no annotations
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        self.bytes = max(self.bytes, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return result


@dataclass
class _Losses:
    """The loss along directions, under the random numbers of the base pass."""

    module: nn.Module
    theta: dict[str, Tensor]
    buffers: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor
    loss_fn: LossFn
    random_state: RandomState
    together: bool = True

    def at(self, directions: Mapping[str, Tensor], step: float, count: int) -> Tensor:
        """l(θ + step·uₖ) for each direction [P, …]: [P] in float64."""
        with torch.no_grad(), preserved_random_state():
            if self.together and count > 1:
                try:
                    return self._together(directions, step, count)
                except RuntimeError as error:
                    # vmap's way to refuse; a true error of the module comes again with the first direction by itself.
                    self._give_up(error)
            each = ({name: u[k] for name, u in directions.items()} for k in range(count))
            return torch.stack([self._alone(direction, step) for direction in each])

    def _loss(self, direction: Mapping[str, Tensor], buffers: Mapping[str, Tensor], step: float) -> Tensor:
        moved = {name: torch.add(self.theta[name], u, alpha=step) for name, u in direction.items()}
        parameters = {**self.theta, **moved}
        return objective(self.module, parameters, buffers, self.inputs, self.targets, self.loss_fn).loss

    def _alone(self, direction: Mapping[str, Tensor], step: float) -> Tensor:
        self.random_state.restore()
        return self._loss(direction, self.buffers, step)

    def _together(self, directions: Mapping[str, Tensor], step: float, count: int) -> Tensor:
        """Running statistics are written per direction, and forgotten; counters are the same for all."""
        own = {name: 0 if buffer.is_floating_point() else None for name, buffer in self.buffers.items()}
        buffers = {
            name: buffer.expand(count, *buffer.shape) if own[name] == 0 else buffer
            for name, buffer in self.buffers.items()
        }
        self.random_state.restore()
        with kept_attributes(self.module), quiet_fallback():
            losses: Tensor = torch.vmap(self._loss, in_dims=(0, own, None))(directions, buffers, step)
        return losses

    def _give_up(self, error: RuntimeError) -> None:
        self.together = False
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"{type(self.module).__name__} cannot be traced for several directions at once ({reason}): one forward "
            "pass per query",
            stacklevel=4,
        )
