"""A Python function as a simulator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from deepzero_core.callables import reason
from deepzero_core.errors import DeepZeroError, RequestError
from simulators.contained import Contained, Crash
from simulators.protocol import Shapes, State

Function = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class FunctionSimulator(Contained):
    """(state, params) → state by a function of numpy arrays or, where it is differentiable, of torch's tensors.

    function: dicts of arrays [N, …], its own copies; each simulation for itself. An exception that it raises is the
    crash of the simulations that it was asked for; its answer of another shape is refused.
    differentiable: the function takes and returns tensors, and torch can take its derivative.
    """

    def __init__(
        self,
        function: Function,
        *,
        state_shapes: Shapes,
        param_shapes: Shapes | None = None,
        differentiable: bool = False,
        limit: float = 1e6,
        batch_size: int | None = 1 << 20,
    ) -> None:
        super().__init__(limit=limit, batch_size=batch_size)
        self.function, self.differentiable = function, differentiable
        self._state_shapes, self._param_shapes = dict(state_shapes), dict(param_shapes or {})

    @property
    def state_shapes(self) -> Shapes:
        return self._state_shapes

    @property
    def param_shapes(self) -> Shapes:
        return self._param_shapes

    def advance(self, state: State, params: State) -> State | Crash:
        given = [{name: self._argument(value) for name, value in some.items()} for some in (state, params)]
        try:
            with np.errstate(all="ignore"):
                after = self.function(*given)
        except DeepZeroError:
            raise
        except Exception as error:  # whatever a simulator raises is its crash; the run goes on and counts it
            return Crash(f"the function {self._name} raised {reason(error)}")
        answer = {}
        for name, value in state.items():
            found = after.get(name)
            if found is None or tuple(np.shape(found)) != tuple(value.shape):
                shape = "nothing" if found is None else f"the shape {tuple(np.shape(found))}"
                raise RequestError(
                    f"the function {self._name} answered {shape} for {name!r}; it must be {tuple(value.shape)}"
                )
            answer[name] = found if isinstance(found, torch.Tensor) else torch.from_numpy(np.array(found))
        return answer

    @property
    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def _argument(self, value: torch.Tensor) -> Any:
        return value if self.differentiable else value.detach().numpy().copy()
