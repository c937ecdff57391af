"""Is it an answer? Each misfit gets one sentence: which black box, what it answered, what is expected.

answer: [N, K] for N examples and K classes, K ≥ 2 and always the same
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.oracle.protocol import Answers

SUM_TOLERANCE = 1e-3
"""How far the probabilities of a row may be from adding up to one: services cut off decimals."""
_RANGE_TOLERANCE = 1e-6
_LABELS = "this looks like labels, which say nothing of a small change: a score for every class is needed"


def as_tensor(name: str, answer: Any, examples: int) -> Tensor:
    """What a box in this process returned, a tensor, an array or lists of numbers, as [N, K] float32 or float64.

    Raises:
        RequestError: it is none of these, or not of floating-point numbers.
    """
    if isinstance(answer, list | tuple):
        return from_lists(name, answer, examples)
    if isinstance(answer, Tensor):
        tensor = answer.detach().cpu()
    elif isinstance(answer, np.ndarray | np.generic):
        if answer.dtype.kind not in "fiub":
            raise _misfit(name, f"an array of {answer.dtype}", examples)
        # A copy, as the box may go on writing into its own array, of a type that torch has.
        kind = answer.dtype if answer.dtype.kind != "f" else np.float64 if answer.dtype.itemsize > 4 else np.float32
        tensor = torch.from_numpy(np.array(answer, kind))
    else:
        raise _misfit(name, f"a {type(answer).__name__}", examples)
    if not tensor.is_floating_point():
        raise _misfit(name, _form(tensor), examples, _LABELS)
    return tensor.clone() if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def from_lists(name: str, rows: Any, examples: int) -> Tensor:
    """N lists of K numbers as they come from JSON, as float64 [N, K].

    Raises:
        RequestError: anything else: labels, objects, ragged rows, text, deeper lists.
    """
    if not isinstance(rows, list | tuple):
        raise _misfit(name, _kind(rows), examples)
    scalars = sum(not isinstance(row, list | tuple) for row in rows)
    if scalars:
        found = next(row for row in rows if not isinstance(row, list | tuple))
        hint = _LABELS if isinstance(found, int | float | str) else ""
        if isinstance(found, dict):
            hint = "a path such as 'predictions.*.scores' picks the scores out of objects"
        raise _misfit(name, f"a list of {len(rows)} with {_kind(found)} in it", examples, hint)
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1:
        raise _misfit(name, f"ragged rows, of {widths[0]} to {widths[-1]} numbers", examples)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _misfit(name, f"{_kind(value)} at row {i}, column {j}", examples)
    try:
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), widths[0] if widths else 0)
    except OverflowError:
        raise WorkError(f"the black box {name} answered a whole number too large for any float") from None


def check(name: str, answers: Answers, answer: Tensor, *, examples: int, classes: int | None) -> Tensor:
    """`answer`, held against all that is expected of it.

    Raises:
        RequestError: another shape than [examples, classes] (classes None: any K ≥ 2), or rows that are no
            probabilities where those are expected.
        WorkError: numbers that are not finite.
    """
    shape = list(answer.shape)
    if not answer.is_floating_point() or len(shape) != 2 or shape[0] != examples or shape[1] != (classes or shape[1]):
        hint = _LABELS if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1) else ""
        raise _misfit(name, _form(answer), examples, hint, classes)
    if shape[1] < 2:
        raise _misfit(name, f"rows of {shape[1]}", examples, "a choice needs at least two classes", classes)
    bad = answer.numel() - int(answer.isfinite().sum())
    if bad:
        raise WorkError(f"the black box {name} answered {bad} numbers of {answer.numel()} that are not finite")
    if answers == "probabilities":
        _check_probabilities(name, answer)
    return answer


def look_like_probabilities(answer: Tensor) -> bool:
    """Whether every row of [N, K] could be a distribution over the classes."""
    return bool((answer >= 0).all()) and bool(((answer.sum(1) - 1).abs() <= SUM_TOLERANCE).all())


def _check_probabilities(name: str, answer: Tensor) -> None:
    low, high = float(answer.min()), float(answer.max())
    if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
        found = f"numbers from {low:.4g} to {high:.4g}"
    else:
        off = (answer.double().sum(1) - 1).abs()
        row = int(off.argmax())
        if float(off[row]) <= SUM_TOLERANCE:
            return
        found = f"a row {row} that sums to {float(answer[row].double().sum()):.6g}"
    raise RequestError(
        f"the black box {name} answered {found}; probabilities are between 0 and 1 and each row sums to 1 within "
        f"{SUM_TOLERANCE:g}: if it answers logits, say so with answers='logits'"
    )


def _misfit(name: str, found: str, examples: int, hint: str = "", classes: int | None = None) -> RequestError:
    expected = f"floating-point numbers of shape [{examples}, {classes or 'K'}], a row for each example"
    return RequestError(f"the black box {name} answered {found}; expected are {expected}{f' ({hint})' if hint else ''}")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


def _kind(value: Any) -> str:
    """What a JSON value is, in words and never at length: it was written by somebody else."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, dict):
        return f"an object with the keys {ascii(list(value)[:5])[:100]}"
    if isinstance(value, str):
        return f"the text {value[:30]!a}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
