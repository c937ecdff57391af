"""What the engine is measured against, written plainly.

no_reuse        one forward pass of the whole network per coordinate
feature_reuse   the paper's scheme: one pass per coordinate, from the cached input of the block that holds it
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

LossFn = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def no_reuse(
    network: nn.Sequential,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    coordinates: Mapping[str, Tensor],
    mu: float,
) -> dict[str, Tensor]:
    """Forward-difference slopes at flat indices, by parameter name: [P] each."""
    base = loss_fn(network(inputs), targets)
    slopes = {}
    for name, indices in coordinates.items():
        flat = network.get_parameter(name).view(-1)
        slopes[name] = torch.stack(
            [_slope(flat, i, mu, base, lambda: loss_fn(network(inputs), targets)) for i in indices]
        )
    return slopes


@torch.no_grad()
def feature_reuse(
    network: nn.Sequential,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    coordinates: Mapping[str, Tensor],
    mu: float,
) -> dict[str, Tensor]:
    """As `no_reuse`, each pass from the input of the block that holds the coordinate."""
    features = [inputs]
    for block in network:
        features.append(block(features[-1]))
    base = loss_fn(features[-1], targets)
    positions = {name: position for position, (name, _) in enumerate(network.named_children())}
    slopes = {}
    for name, indices in coordinates.items():
        first = positions[name.split(".")[0]]
        rest = nn.Sequential(*list(network)[first:])
        flat = network.get_parameter(name).view(-1)
        evaluate = lambda rest=rest, first=first: loss_fn(rest(features[first]), targets)  # noqa: E731
        slopes[name] = torch.stack([_slope(flat, index, mu, base, evaluate) for index in indices])
    return slopes


def _slope(flat: Tensor, index: Tensor, mu: float, base: Tensor, evaluate: Callable[[], Tensor]) -> Tensor:
    kept = flat[index].clone()
    flat[index] += mu
    slope = (evaluate() - base) / mu
    flat[index] = kept
    return slope
