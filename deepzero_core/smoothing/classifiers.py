"""The classifier that is defended: hidden behind its answers, and asked once for what it says of every image."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from deepzero_core.data import Split
from deepzero_core.data.batches import to_tensor
from deepzero_core.errors import RequestError, WorkError
from deepzero_core.perturb.black_box import BlackBox
from deepzero_core.perturb.objective import preserved_random_state


def hide(classifier: nn.Module, *, batch_size: int | None = 1024) -> BlackBox:
    """A classifier of which nothing but its answers is seen: no gradient, no weights, no trace of its operators.

    classifier: images [N, C, H, W] in [0, 1] → logits [N, K], in evaluation mode, its normalisation inside. It answers
    in its own type on its own device and is asked at most `batch_size` images at once, None for any number. On a CPU
    larger questions leave the caches: a cnn of 8×8 images took 29 µs per image by 1,024 and 75 µs by 65,536.

    RequestError: the classifier is in training mode, where an answer depends on the other images.
    """
    require_evaluation(classifier)
    return BlackBox(_Answers(classifier), batch_size=batch_size)


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


class _Answers:
    """numpy [N, C, H, W] → numpy [N, K]."""

    def __init__(self, classifier: nn.Module) -> None:
        self.classifier = classifier
        self.__name__ = type(classifier).__name__

    def __call__(self, images: np.ndarray) -> np.ndarray:
        parameter = next(self.classifier.parameters(), None)
        question = torch.from_numpy(images)
        if parameter is not None:
            question = question.to(parameter.device, parameter.dtype)
        with torch.no_grad(), preserved_random_state():
            answer: np.ndarray = self.classifier(question).cpu().numpy()
        return answer
