"""Black boxes: functions that torch cannot see into, inside a module or behind it.

    y = box(x)                       x [N, …] → y [N, …], asked in pieces of at most `batch_size` examples
    behind(box, loss_fn)             the loss loss_fn(box(outputs), targets)
    Δ[p] = f(x + δ[p]) − f(x)        P perturbations of B examples are one question of P·B examples

A box is one operator, `deepzero::black_box`, in a graph as under `torch.vmap`: the general path of the engine is right
for it. Both values are the box's own, so the difference cancels: its rounding is that of y, not of Δ, and μ must be the
larger for it (docs/black-boxes.md).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import _disable_current_modes

from deepzero_core.errors import RequestError, WorkError
from deepzero_core.perturb.objective import LossFn

Function = Callable[[np.ndarray], Any]


class BlackBox(nn.Module):
    """A function of numpy arrays as a layer without parameters: an API, a simulator, anything outside torch.

    function:   [N, …] → [N, …], each example for itself, the same answer to the same question. Its argument is its own
                copy, float32 where x is bfloat16. Its answer is anything that numpy takes for an array of floats.
    batch_size: the most examples it accepts at once; None: any number.

    The answer comes in the type and on the device of x. To learn its shape, the box may be asked about one example of
    zeros. Copies of the module that holds a box ask the same function and count together; a pickled one counts anew.

    Raises:
        RequestError: an answer of another length than the question, of another shape than before or not of floats;
            batch_size < 1; a derivative is asked for.
        WorkError: an answer that is not finite.
    """

    def __init__(self, function: Function, *, batch_size: int | None = None) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"batch_size, the most examples of one call, must be at least 1, not {batch_size}")
        self._oracle = _Oracle(function, batch_size)

    @property
    def queries(self) -> int:
        """Examples sent so far: P·B for P perturbations of a batch of B."""
        return self._oracle.queries

    @property
    def calls(self) -> int:
        """Calls of the function so far."""
        return self._oracle.calls

    @property
    def rounding(self) -> float | None:
        """ε, the relative rounding of the coarsest question or answer so far, by their types; None before the first.

        An answer of four decimals in float64 is coarser than its type: that only its author knows.
        """
        return self._oracle.rounding

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim == 0:
            shape = "a tensor without axes" if isinstance(x, Tensor) else type(x).__name__
            raise RequestError(f"the black box {self._oracle.name} takes a tensor [N, …], not {shape}")
        # These would pass by unnoticed: forward mode takes an operator without a formula for a constant.
        if torch._C._functorch.is_gradtrackingtensor(x) or unpack_dual(x).tangent is not None:
            _no_derivative(self._oracle.name)
        answer: Tensor = _black_box(x, self._oracle.handle)
        return answer

    def extra_repr(self) -> str:
        return f"{self._oracle.name}, batch_size={self._oracle.batch_size}"


def behind(box: Callable[[Any], Any], loss_fn: LossFn) -> LossFn:
    """The loss of what a black box makes of the outputs: (outputs, targets) → loss_fn(box(outputs), targets)."""
    return _Behind(box, loss_fn)


@dataclass(frozen=True)
class _Behind:
    """Equal when its parts are, so that an evaluator stays the right one; and fit for pickling, as no closure is."""

    box: Callable[[Any], Any]
    loss_fn: LossFn

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        return self.loss_fn(self.box(outputs), targets)


class _Oracle:
    """The function itself, what it has been asked, and the number by which the operator finds it."""

    def __init__(self, function: Function, batch_size: int | None) -> None:
        self.function, self.batch_size = function, batch_size
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self._begin()

    def _begin(self) -> None:
        self.queries, self.calls = 0, 0
        self.rounding: float | None = None
        self._shapes: dict[torch.Size, tuple[int, ...]] = {}
        self.handle = next(_handles)
        _oracles[self.handle] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Oracle":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "batch_size": self.batch_size, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def answer(self, x: Tensor) -> Tensor:
        """f(x) [N, …], in the type and on the device of x."""
        pieces = x.split(self.batch_size or len(x)) if len(x) else ()
        answers = [self._ask(piece) for piece in pieces]
        result = torch.cat(answers) if answers else torch.empty(0, *self.shape(x))
        bad = result.numel() - int(result.isfinite().sum())
        if bad:
            raise WorkError(
                f"{bad} of the {result.numel()} numbers that the black box {self.name} answered to a question of shape "
                f"{tuple(x.shape)} are not finite"
            )
        return result.to(x.device, _type_of_answer(x))

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Of the answer to one example of x; where none has been given yet, of the answer to zeros."""
        inner = x.shape[1:]
        if inner not in self._shapes:
            # x may be a stand-in without values, in the midst of a trace: the function is to see a true array.
            with _disable_current_modes(), np.errstate(all="ignore"):
                self._ask(torch.zeros(1, *inner, dtype=x.dtype))
        return self._shapes[inner]

    def _ask(self, x: Tensor) -> Tensor:
        """One call: [N, …] → [N, …] in float32 or, where the answer is finer, float64."""
        question = _array(x)
        self.calls += 1
        self.queries += len(x)
        answer = np.asarray(self.function(question))
        expected = self._shapes.get(x.shape[1:], answer.shape[1:])
        if answer.dtype.kind != "f" or answer.shape != (len(x), *expected):
            wanted = ", ".join(map(str, [len(x), *expected]))
            wanted += ", …" if x.shape[1:] not in self._shapes else ""
            raise RequestError(
                f"the black box {self.name} answered {answer.dtype} of shape {answer.shape} to a question of shape "
                f"{tuple(x.shape)}; it must answer floating-point numbers of shape ({wanted})"
            )
        self._shapes[x.shape[1:]] = answer.shape[1:]
        types = [kind.dtype for kind in (question, answer) if kind.dtype.kind == "f"]
        self.rounding = max([self.rounding or 0.0, *(float(np.finfo(kind).eps) for kind in types)])
        return torch.from_numpy(np.array(answer, np.float64 if answer.dtype.itemsize > 4 else np.float32))


_oracles: WeakValueDictionary[int, _Oracle] = WeakValueDictionary()
_handles = itertools.count()


def _array(x: Tensor) -> np.ndarray:
    """A copy that the function may write into: x may be a value that the engine keeps."""
    values = x.detach().float() if x.dtype == torch.bfloat16 else x.detach()
    return values.cpu().numpy().copy()


def _type_of_answer(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def _no_derivative(name: str) -> NoReturn:
    raise RequestError(f"the black box {name} has no derivative: estimate the gradient with cge or rge")


@torch.library.custom_op("deepzero::black_box", mutates_args=())
def _black_box(x: Tensor, handle: int) -> Tensor:
    return _oracles[handle].answer(x)


@_black_box.register_fake
def _shape_of_answer(x: Tensor, handle: int) -> Tensor:
    return x.new_empty([x.shape[0], *_oracles[handle].shape(x)], dtype=_type_of_answer(x))


@_black_box.register_vmap
def _all_at_once(info: Any, in_dims: tuple[int, None], x: Tensor, handle: int) -> tuple[Tensor, int]:
    """Perturbations and examples folded into one question: [P, B, …] → [P·B, …]."""
    x = x.movedim(in_dims[0], 0)
    return _black_box(x.flatten(0, 1), handle).unflatten(0, x.shape[:2]), 0


def _remember(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.handle = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> NoReturn:
    _no_derivative(_oracles[ctx.handle].name)


_black_box.register_autograd(_backward, setup_context=_remember)
