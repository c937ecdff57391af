"""What a certification is asked for."""

import math
from dataclasses import dataclass

from deepzero_core.errors import RequestError


@dataclass(frozen=True)
class Certification:
    """Settings of `certify`, checked when they are made.

    sigma: standard deviation of the noise, units of x. n0: copies that choose the class. n: copies that bound its
    probability, at most that many in adaptive mode. alpha: probability with which a certificate may be wrong.
    batch_size: most noisy copies given to the classifier at once. adaptive: stop an example as soon as it is settled at
    every one of `radii`, L2, units of x, and at 0 (see `deepzero_core.smoothing.adaptive`).

    RequestError: a value out of range.
    """

    sigma: float
    n0: int
    n: int
    alpha: float
    batch_size: int
    adaptive: bool = False
    radii: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check(sigma=self.sigma, alpha=self.alpha, n0=self.n0, n=self.n, batch_size=self.batch_size)
        for radius in self.radii:
            if not (radius >= 0 and math.isfinite(radius)):
                raise RequestError(f"a radius must be finite and at least 0, but is {radius}")


def check(*, sigma: float, alpha: float, **counts: int) -> None:
    """RequestError: sigma, alpha or a count out of range."""
    if not (sigma > 0 and math.isfinite(sigma)):
        raise RequestError(f"sigma, the standard deviation of the noise, must be positive and finite, but is {sigma}")
    if not 0 < alpha < 1:
        raise RequestError(f"alpha, the probability of a wrong answer, must lie between 0 and 1, but is {alpha}")
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RequestError(f"{name} must be a whole number of at least 1, but is {value!r}")
