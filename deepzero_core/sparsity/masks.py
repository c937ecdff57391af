"""From scores to layer-wise pruning ratios, and from ratios to masks.

Scores: dict[parameter name, Tensor], higher = keep. Masks: dict[parameter name, BoolTensor of the parameter's shape],
True = keep (estimate this coordinate). Sparsity and ratios are shares REMOVED, in [0, 1].
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deepzero_core.errors import RequestError, WorkError, suggest


def layer_ratios(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Each layer's share that one global threshold removes (layer-wise pruning ratios, LPR).

    Exactly round(sparsity · total) scores are removed, the lowest first; of equal ones the first in the order of
    `scores`.

    RequestError: no scores, sparsity outside [0, 1]. WorkError: a score that is not finite.
    """
    keep = top_masks(scores, sparsity)
    return {name: int((~mask).sum()) / max(mask.numel(), 1) for name, mask in keep.items()}


def top_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """The mask that keeps the highest scores: where `layer_ratios` puts its threshold, position by position.

    This is the mask of pruning proper (sparse weights). Masks lie where their scores do. Errors as `layer_ratios`.
    """
    if not scores:
        raise RequestError("there are no scores to prune by")
    if not 0 <= sparsity <= 1:
        raise RequestError(f"sparsity is the share of weights removed, between 0 and 1, but is {sparsity}")
    for name, score in scores.items():
        bad = int((~torch.isfinite(score)).sum())
        if bad:
            raise WorkError(
                f"{bad} of the {score.numel()} scores of {name!r} are not finite: look at the loss at the start, "
                "the scale of the inputs and mu"
            )
    flat = torch.cat([score.detach().reshape(-1).double().cpu() for score in scores.values()])
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    keep[torch.sort(flat, stable=True).indices[: round(sparsity * flat.numel())]] = False
    parts = torch.split(keep, [score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def draw_masks(ratios: Mapping[str, float], module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A random mask per layer that keeps exactly numel − round(ratio · numel) coordinates of it.

    Trainable parameters without a ratio (biases, normalisation layers) are kept whole. Layers are drawn in the order of
    `module.named_parameters()`, so the masks are a function of the ratios and the state of the generator alone.

    RequestError: a ratio outside [0, 1], or of a parameter which the module has not, or does not train.
    """
    trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
    for name, ratio in ratios.items():
        if name not in trainable:
            raise RequestError(f"{name!r} is not a trainable parameter of the module; {suggest(name, trainable)}")
        if not 0 <= ratio <= 1:
            raise RequestError(f"the pruning ratio of {name!r} must be between 0 and 1, but is {ratio}")
    masks = {}
    for name, value in trainable.items():
        mask = torch.ones(value.numel(), dtype=torch.bool)
        if name in ratios:
            removed = round(ratios[name] * value.numel())
            mask[torch.randperm(value.numel(), generator=generator, device=generator.device)[:removed].cpu()] = False
        masks[name] = mask.view(value.shape).to(value.device)
    return masks
