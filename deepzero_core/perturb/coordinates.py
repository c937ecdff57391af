"""Which coordinates to estimate: None, boolean masks or flat indices, by parameter name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deepzero_core.errors import RequestError, suggest


def resolve(module: nn.Module, coordinates: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Sorted flat indices without repetition, by parameter name, in the module's order of parameters.

    None stands for every trainable parameter. A mask has its parameter's shape, True = estimate; an index tensor is
    one-dimensional. Parameters that are not named are not estimated.

    Raises:
        RequestError: unknown parameter, mask of another shape, index out of range; says what would be right.
    """
    parameters = dict(module.named_parameters())
    if coordinates is None:
        return {n: torch.arange(p.numel(), device=p.device) for n, p in parameters.items() if p.requires_grad}
    for name in coordinates:
        if name not in parameters:
            raise RequestError(f"coordinates name the unknown parameter {name!r}: {suggest(name, parameters)}")
    return {
        name: _flat(name, coordinates[name], parameter) for name, parameter in parameters.items() if name in coordinates
    }


def _flat(name: str, chosen: Tensor, parameter: Tensor) -> Tensor:
    if chosen.dtype == torch.bool:
        if chosen.shape != parameter.shape:
            raise RequestError(
                f"the mask of {name!r} has shape {tuple(chosen.shape)}, its parameter {tuple(parameter.shape)}"
            )
        return chosen.flatten().nonzero().squeeze(1).to(parameter.device)
    if chosen.dtype not in (torch.int64, torch.int32) or chosen.ndim != 1:
        raise RequestError(
            f"the coordinates of {name!r} must be a boolean mask of shape {tuple(parameter.shape)} or a "
            f"one-dimensional tensor of flat indices, not {chosen.dtype} of shape {tuple(chosen.shape)}"
        )
    indices: Tensor = chosen.to(parameter.device, torch.long).unique()
    if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= parameter.numel()):
        raise RequestError(
            f"the coordinates of {name!r} reach from {int(indices[0])} to {int(indices[-1])}, "
            f"valid are 0 to {parameter.numel() - 1}"
        )
    return indices


def count(coordinates: Mapping[str, Tensor]) -> int:
    """The number of coordinates in all."""
    return sum(indices.numel() for indices in coordinates.values())


def scatter(
    parameters: Mapping[str, Tensor], coordinates: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values at coordinates as full tensors by parameter name, zero elsewhere."""
    gradients = {name: torch.zeros_like(parameter).flatten() for name, parameter in parameters.items()}
    for name, indices in coordinates.items():
        if indices.numel():
            gradients[name][indices] = values[name].to(gradients[name].dtype)
    return {name: flat.view_as(parameters[name]) for name, flat in gradients.items()}
