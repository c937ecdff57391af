"""The classifier that is defended, asked once for what it says of every image."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from deepzero_core.data import Split
from deepzero_core.data.batches import to_tensor
from deepzero_core.errors import RequestError, WorkError


def require_evaluation(classifier: nn.Module) -> None:
    """RequestError where any part of the classifier is in training mode."""
    if any(part.training for part in classifier.modules()):
        raise RequestError("the classifier is in training mode; call .eval() on it first")


def label_table(classifier: Callable[[Tensor], Tensor], split: Split, *, batch_size: int = 1024) -> Tensor:
    """argmax f(x) of every image of the split, int64 [N]: len(split) questions to f, asked once for a whole training.

    WorkError: logits that are not numbers.
    """
    labels = []
    with torch.no_grad():
        for start in range(0, len(split), batch_size):
            logits = classifier(to_tensor(split.images[start : start + batch_size]))
            if bool(torch.isnan(logits).any()):
                raise WorkError("the classifier answered with logits that are not numbers (NaN)")
            labels.append(logits.argmax(1).cpu())
    return torch.cat(labels)


def relabelled(split: Split, labels: Tensor) -> Split:
    """The split with the classifier's labels in place of its own: what the stability loss compares with.

    The labels belong to the images as they are: batches of them are not to be augmented.
    RequestError: another number of labels.
    """
    if labels.shape != (len(split),):
        raise RequestError(f"the split has {len(split)} images, but the labels have shape {tuple(labels.shape)}")
    return replace(split, labels=labels.to(torch.int64).numpy(), origin=None)
