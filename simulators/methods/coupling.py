"""How a corrector and a simulation meet: what the network sees of a state, and what its answer changes.

image       [N, C, …]        the fields that are corrected and compared with the reference
features    [N, C + E, …]    image and parameters in units of their standard deviations
corrected   state + s · correction on the image's numbers, s the image's standard deviations
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from deepzero_core.errors import RequestError
from simulators.cases import Case
from simulators.protocol import Fields, State


@dataclass(frozen=True)
class Scales:
    """Standard deviations over the training data, one for each channel of the image and of the extra features."""

    image: tuple[float, ...]
    extra: tuple[float, ...] = ()


class Coupling(ABC):
    """scales: those of `scales_of`; ones where nothing is known."""

    def __init__(self, scales: Scales) -> None:
        self.scales = scales

    @abstractmethod
    def image(self, state: Fields) -> Tensor:
        """[N, C, …]."""

    @abstractmethod
    def extra(self, params: Fields, image: Tensor) -> Tensor:
        """[N, E, …], of the image's extent."""

    @abstractmethod
    def add(self, state: Fields, change: Tensor) -> State:
        """The state whose image is `change` larger."""

    def features(self, state: Fields, params: Fields) -> Tensor:
        """[N, C + E, …], what a corrector sees."""
        image = self.image(state)
        extra = self.extra(params, image)
        return torch.cat([image / _channels(self.scales.image, image), extra / _channels(self.scales.extra, extra)], 1)

    def corrected(self, state: Fields, correction: Tensor) -> State:
        """correction: [N, C, …], a corrector's answer, in units of the image's standard deviations."""
        return self.add(state, correction * _channels(self.scales.image, correction))


class WakeCoupling(Coupling):
    """Image: (v_x, v_y) at the left and lower edges of cells, without the last ones; extra: the Reynolds number.

    The faces of the upper and of the right edge are not corrected. Source: Um et al. 2020.
    """

    def image(self, state: Fields) -> Tensor:
        return torch.stack([state["velocity_x"][..., :-1], state["velocity_y"][..., :-1, :]], 1)

    def extra(self, params: Fields, image: Tensor) -> Tensor:
        return params["reynolds"].view(-1, 1, 1, 1).expand_as(image[:, :1])

    def add(self, state: Fields, change: Tensor) -> State:
        return dict(state) | {
            "velocity_x": state["velocity_x"] + F.pad(change[:, 0], (0, 1)),
            "velocity_y": state["velocity_y"] + F.pad(change[:, 1], (0, 0, 0, 1)),
        }


class BurgersCoupling(Coupling):
    """Image: (v_x, v_y); extra: the force (F_x, F_y) of the step. Source: Um et al. 2020."""

    def image(self, state: Fields) -> Tensor:
        return state["velocity"]

    def extra(self, params: Fields, image: Tensor) -> Tensor:
        return params["force"]

    def add(self, state: Fields, change: Tensor) -> State:
        return dict(state) | {"velocity": state["velocity"] + change}


class FieldCoupling(Coupling):
    """Image: one field [N, …] of any simulator as one channel, [N, 1, …]; nothing else is seen."""

    def __init__(self, field: str, scales: Scales | None = None) -> None:
        super().__init__(scales or Scales((1.0,)))
        self.field = field

    def image(self, state: Fields) -> Tensor:
        return state[self.field].unsqueeze(1)

    def extra(self, params: Fields, image: Tensor) -> Tensor:
        return image[:, :0]

    def add(self, state: Fields, change: Tensor) -> State:
        return dict(state) | {self.field: state[self.field] + change.squeeze(1)}


def scales_of(coupling: Coupling, cases: Sequence[Case]) -> Scales:
    """Standard deviations over all frames of the training cases; of what never varies, its size.

    RequestError: no cases, or a channel that is zero throughout.
    """
    if not cases:
        raise RequestError("standard deviations need at least one case")
    images = torch.cat([coupling.image(case.frames) for case in cases])
    extras = torch.cat([coupling.extra(case.params, coupling.image(case.frames)) for case in cases])
    return Scales(_deviations(images), _deviations(extras))


def _deviations(values: Tensor) -> tuple[float, ...]:
    each = values.double().transpose(0, 1).flatten(1)
    found = torch.where(each.std(1) > 1e-12 * each.abs().amax(1), each.std(1), each.abs().mean(1))
    if not bool((found > 0).all()):
        raise RequestError("a channel of the training data is zero throughout: there is no scale to measure it by")
    return tuple(found.tolist())


def _channels(scales: tuple[float, ...], values: Tensor) -> Tensor:
    """The scales along axis 1."""
    return values.new_tensor(scales).view(-1, *[1] * (values.ndim - 2))
