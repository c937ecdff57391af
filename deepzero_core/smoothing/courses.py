"""How one example is certified or predicted: which numbers of noisy copies it asks for, and what follows from them.

A course is a generator: it yields how many copies it wants classified next, is sent how often each class was the answer
(int64 [K]), and returns its result. It knows nothing of classifiers and batches, so that copies of many examples can
share a batch without any of them noticing.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from scipy.stats import binomtest
from torch import Tensor

from deepzero_core.smoothing.bounds import lower_bound, radius_of
from deepzero_core.smoothing.settings import Certification

ABSTAIN = -1

R = TypeVar("R")
Course = Generator[int, Tensor, R]


@dataclass(frozen=True)
class Certificate:
    """What `certify` can promise about one example.

    label: the smoothed classifier's answer, −1 = abstain. radius: L2, units of x; 0.0 where it abstains.
    samples: noisy copies that the answer rests on, selection and estimation together.
    p_lower: lower confidence bound on the probability of the class that looked most likely, also where it abstains.
    saved: copies of n0 + n that adaptive mode did without.
    """

    label: int
    radius: float
    samples: int
    p_lower: float
    saved: int = 0

    @property
    def abstained(self) -> bool:
        return self.label == ABSTAIN


def certificate(label: int, p_lower: float, samples: int, settings: Certification) -> Certificate:
    """The certificate that a lower bound on the probability of `label` gives."""
    answer = label if p_lower > 0.5 else ABSTAIN
    saved = settings.n0 + settings.n - samples
    return Certificate(answer, radius_of(p_lower, settings.sigma), samples, p_lower, saved)


def fixed(settings: Certification) -> Course[Certificate]:
    """CERTIFY of Cohen et al. 2019: n0 copies choose the class, n fresh ones bound its probability."""
    chosen = int((yield settings.n0).argmax())
    hits = int((yield settings.n)[chosen])
    p_lower = lower_bound(hits, settings.n, settings.alpha)
    return certificate(chosen, p_lower, settings.n0 + settings.n, settings)


def prediction(n: int, alpha: float) -> Course[int]:
    """PREDICT of Cohen et al. 2019: the two classes seen most often are told apart by a two-sided binomial test."""
    (first, second), (label, _) = (part.tolist() for part in (yield n).topk(2))
    return int(label) if binomtest(first, first + second, 0.5).pvalue <= alpha else ABSTAIN
