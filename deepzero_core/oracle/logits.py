"""One form of answer for all that comes after: logits; and the bridge to the perturbation engine."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepzero_core.errors import RequestError
from deepzero_core.oracle.protocol import Oracle
from deepzero_core.perturb.black_box import BlackBox


def logits(oracle: Oracle, batch: Tensor, *, floor: float | None = None) -> Tensor:
    """[N, …] → [N, K]: the box's logits, or log p of its probabilities p, of which softmax is p again.

    floor: the least p that the logarithm is taken of, by default the smallest normal number of its type. A service of
        four decimals means by 0.0000 anything below 5e-5: with floor=5e-5 a loss on it stays of the right size.

    Raises:
        RequestError: a floor that is not between 0 and 1. And whatever `oracle.query` raises.
    """
    if floor is not None and not 0 < floor < 1:
        raise RequestError(f"the floor of probabilities must lie between 0 and 1, not {floor!r}")
    answer = oracle.query(batch)
    if oracle.answers == "logits":
        return answer
    least = torch.finfo(answer.dtype).tiny
    return answer.clamp(min=max(floor or 0.0, least)).log()


def as_layer(oracle: Oracle, *, floor: float | None = None) -> BlackBox:
    """The box as a layer without parameters, [N, …] → logits [N, K]: inside a module or, by `behind`, after one."""
    return BlackBox(_Logits(oracle, floor), batch_size=oracle.batch_size)


@dataclass(frozen=True)
class _Logits:
    """A function of arrays; a class, so that it can be sent to workers."""

    oracle: Oracle
    floor: float | None

    @property
    def __name__(self) -> str:
        return self.oracle.name

    def __call__(self, x: np.ndarray) -> np.ndarray:
        found: np.ndarray = logits(self.oracle, torch.from_numpy(x), floor=self.floor).numpy()
        return found
