"""Functions outside torch, inside a module and behind it: equal to the reference, in as few questions as possible."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import BlackBox, behind, cge, first_order, forward_gradient, reference, rge
from deepzero_core.errors import RequestError, WorkError
from deepzero_core.perturb.evaluator import prepare

SPRINGS = np.linspace(0.5, 2.0, 12).reshape(4, 3)


def simulator(x: np.ndarray) -> np.ndarray:
    """[N, 4] → [N, 3]"""
    return np.sin(x @ SPRINGS)


class Recording:
    """A function and the sizes of the questions it was asked."""

    def __init__(self, function: Callable[[np.ndarray], object] = simulator) -> None:
        self.function, self.sizes = function, []

    def __call__(self, x: np.ndarray) -> object:
        self.sizes.append(len(x))
        return self.function(x)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets[:, None]).square().mean(1)


def layers(box: BlackBox | None = None) -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()]
    return nn.Sequential(*parts, *([box, nn.Linear(3, 2)] if box is not None else [])).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)


def inside(box: BlackBox) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    return layers(box), squared_error


def at_the_end(box: BlackBox) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    return layers(), behind(box, squared_error)


PLACES = pytest.mark.parametrize("place", [inside, at_the_end])


@PLACES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_engine_agrees_with_reference(place, training: bool, difference: str, batch_size: int | None) -> None:
    module, loss_fn = place(BlackBox(simulator, batch_size=batch_size))
    module.train(training)
    assert prepare(module, *batch(), loss_fn).untraced is None
    found = cge(module, *batch(), loss_fn, mu=1e-4, difference=difference)
    expected = reference.cge(module, *batch(), loss_fn, mu=1e-4, difference=difference)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-5, atol=1e-8)
        assert gradient.abs().max() > 1e-5 or name == "0.bias", "BatchNorm hides the bias before it, and nothing else"


@PLACES
def test_random_directions_agree_with_reference(place) -> None:
    module, loss_fn = place(BlackBox(simulator, batch_size=7))
    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    found = rge(module, *batch(), loss_fn, queries=9, generator=seeded[0])
    expected = reference.rge(module, *batch(), loss_fn, queries=9, generator=seeded[1])
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-6, atol=1e-9)


def test_one_question_for_all_perturbations_in_as_few_calls_as_possible() -> None:
    function = Recording()
    box = BlackBox(function, batch_size=100)
    module, inputs, targets = layers(), *batch()
    evaluator = prepare(module, inputs, targets, behind(box, squared_error))
    chosen = {"0.weight": torch.arange(20)}

    def estimate() -> None:
        cge(module, inputs, targets, evaluator.situation.loss_fn, coordinates=chosen, evaluator=evaluator)

    estimate()  # measures how many bytes one perturbation takes
    function.sizes.clear()
    before = box.queries, box.calls
    estimate()
    assert function.sizes == [6, 100, 20]
    assert (box.queries - before[0], box.calls - before[1]) == (6 + 20 * 6, 3)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8, None])
@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_pieces(count: int, batch_size: int | None) -> None:
    function = Recording()
    x = torch.randn(count, 4, dtype=torch.float64)
    box = BlackBox(function, batch_size=batch_size)
    answer = box(x)
    torch.testing.assert_close(answer, torch.from_numpy(simulator(x.numpy())), rtol=1e-12, atol=0)
    if count:
        assert max(function.sizes) <= (batch_size or count)
        assert len(function.sizes) == math.ceil(count / (batch_size or count))
        assert sum(function.sizes) == box.queries == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_answers_in_the_type_of_the_question(dtype: torch.dtype) -> None:
    box = BlackBox(lambda x: np.tanh(x.astype(np.float64)))
    x = torch.randn(5, 4).to(dtype)
    assert box.rounding is None
    assert torch.equal(box(x), torch.from_numpy(np.tanh(x.double().numpy())).to(dtype))
    asked = torch.float32 if dtype == torch.bfloat16 else dtype
    assert box.rounding == torch.finfo(asked).eps


def test_images_and_shapes_that_change() -> None:
    box = BlackBox(lambda x: x.mean((2, 3))[:, ::-1])
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), box).double()
    for size in (5, 7):
        inputs, targets = torch.randn(4, 1, size, size, dtype=torch.float64), torch.randn(4).double()
        found = cge(module, inputs, targets, squared_error)
        expected = reference.cge(module, inputs, targets, squared_error)
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-5, atol=1e-8)


def test_several_boxes_and_one_box_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.square, self.sine = nn.Linear(5, 4), BlackBox(np.square), BlackBox(np.sin, batch_size=5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.square(self.linear(x))
            return self.square(self.sine(y) + y) * self.linear.bias

    torch.manual_seed(0)
    module = Twice().double()
    found = cge(module, *batch(), squared_error)
    for name, gradient in reference.cge(module, *batch(), squared_error).gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-5, atol=1e-8)


def test_a_function_may_write_into_its_question_and_reuse_its_answer() -> None:
    memory = np.zeros((100, 4))

    def careless(x: np.ndarray) -> np.ndarray:
        x *= 2
        memory[: len(x)] = np.sin(x)
        return memory[: len(x)]

    box = BlackBox(careless, batch_size=4)
    x = torch.randn(10, 4, dtype=torch.float64)
    kept = x.clone()
    first = box(x)
    box(torch.zeros(10, 4, dtype=torch.float64))
    assert torch.equal(x, kept)
    torch.testing.assert_close(first, torch.sin(2 * kept), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[:-1], r"answered float64 of shape \(5, 4\).*shape \(6, 4\).*\(6, 4, …\)"),
        (lambda x: x.sum(), r"of shape \(\).*must answer floating-point numbers of shape \(6, …\)"),
        (lambda x: x.argmax(1), r"answered int64 of shape \(6,\)"),
        (lambda x: None, "answered object"),
    ],
    ids=["short", "scalar", "labels", "nothing"],
)
def test_a_wrong_answer_is_refused(function: Callable[[np.ndarray], object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BlackBox(function)(torch.randn(6, 4, dtype=torch.float64))


def test_an_answer_of_another_shape_than_before_is_refused() -> None:
    box = BlackBox(lambda x: x if len(x) > 2 else x[:, :1], batch_size=3)
    with pytest.raises(RequestError, match=r"<lambda> answered float64 of shape \(2, 1\).*of shape \(2, 4\)$"):
        box(torch.randn(5, 4, dtype=torch.float64))


def test_an_answer_that_is_not_finite_is_refused() -> None:
    box = BlackBox(lambda x: np.where(x > 1e3, np.nan, x))
    x = torch.ones(6, 4)
    x[2, 1] = 1e4
    with pytest.raises(WorkError, match=r"1 of the 24 numbers that the black box <lambda> answered .* are not finite"):
        box(x)


@pytest.mark.parametrize("question", [torch.tensor(1.0), [1.0]], ids=["scalar", "list"])
def test_a_question_without_a_batch_is_refused(question: object) -> None:
    with pytest.raises(RequestError, match=r"the black box simulator takes a tensor \[N, …\], not"):
        BlackBox(simulator)(question)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_impossible_batch_size_is_refused(batch_size: int) -> None:
    with pytest.raises(RequestError, match="must be at least 1"):
        BlackBox(simulator, batch_size=batch_size)


DERIVATIVES = {
    "first_order": first_order,
    "forward_gradient": lambda *a: forward_gradient(*a, queries=2, generator=torch.Generator()),
    "grad": lambda m, x, t, loss: torch.func.grad(lambda x: loss(m(x), t).mean())(x),
    "dual": lambda m, x, t, loss: dual(m, x),
}


def dual(module: nn.Module, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_is_refused_rather_than_wrong(name: str) -> None:
    module, loss_fn = inside(BlackBox(simulator))
    module.eval()  # BatchNorm in training mode has refusals of its own
    with pytest.raises(RequestError, match="the black box simulator has no derivative"):
        DERIVATIVES[name](module, *batch(), loss_fn)


def test_a_simulator_that_fails_on_zeros_is_traced_as_soon_as_it_has_answered() -> None:
    def fails_on_zeros(x: np.ndarray) -> np.ndarray:
        if not x.any():
            raise ArithmeticError("nothing to simulate")
        return simulator(x)

    module, loss_fn = inside(BlackBox(fails_on_zeros))
    with pytest.warns(UserWarning, match=r"cannot be traced \(nothing to simulate\)"):
        prepare(module, *batch(), loss_fn)
    module(batch()[0])
    assert prepare(module, *batch(), loss_fn).untraced is None


def test_zeros_are_not_judged_by_their_answer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = nn.Sequential(nn.Linear(5, 4), BlackBox(lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)))
        assert prepare(module.double(), *batch(), squared_error).untraced is None


def test_a_box_that_answers_the_same_question_differently_is_not_traced() -> None:
    noise = np.random.default_rng(0)
    module, loss_fn = inside(BlackBox(lambda x: simulator(x) + noise.standard_normal((len(x), 3))))
    with pytest.warns(UserWarning, match="its graph gives the loss"):
        prepare(module, *batch(), loss_fn)


def test_copies_ask_and_count_together_and_a_pickled_box_by_itself() -> None:
    module, _ = inside(BlackBox(simulator))
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    inputs, _ = batch()
    expected = module(inputs)
    assert torch.equal(copied(inputs), expected)
    assert torch.equal(pickled(inputs), expected)
    assert module[3].queries == copied[3].queries == 2 * pickled[3].queries == 12
    copied.eval()
    assert module[3].training, "the copy's mode is its own"


def test_behind_is_equal_when_its_parts_are() -> None:
    box = BlackBox(simulator)
    module, inputs, targets = layers(), *batch()
    evaluator = prepare(module, inputs, targets, behind(box, squared_error))
    estimate = cge(module, inputs, targets, behind(box, squared_error), evaluator=evaluator)
    assert estimate.loss == pytest.approx(behind(box, squared_error)(module(inputs), targets).mean().item())


def test_the_best_step_grows_with_the_rounding_of_the_box() -> None:
    """μ ≈ 2·(ε·|l|/|l″|)^½: the error against the derivative is below those at a tenth and at ten times that μ."""
    target = torch.zeros(1, dtype=torch.float64)
    weight = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(weight.weight, 0.7)
    one = torch.ones(1, 1, dtype=torch.float64)
    for decimals in (4, 8):
        box = BlackBox(lambda x, decimals=decimals: np.round(np.exp(x), decimals))
        best = 2 * math.sqrt(0.5 * 10**-decimals / math.exp(0.7))

        def error(mu: float, box: BlackBox = box) -> float:
            """Root mean square over steps of nearly this size: rounding is as good as random."""
            steps = [mu * (1 + 0.01 * i) for i in range(20)]
            slopes = [cge(weight, one, target, behind(box, lambda y, _: y.sum()), mu=m) for m in steps]
            return math.sqrt(sum((s.gradients["weight"].item() - math.exp(0.7)) ** 2 for s in slopes) / len(steps))

        assert error(best) < 0.5 * min(error(best / 10), error(best * 10))


def test_cross_entropy_of_a_remote_classifier() -> None:
    """Logarithms of the probabilities that a service gives, after a trainable layer in front of it."""

    def service(x: np.ndarray) -> np.ndarray:
        scores = np.exp(x @ SPRINGS)
        return scores / scores.sum(1, keepdims=True)

    module = layers()
    inputs, targets = batch()[0], torch.randint(3, (6,))
    loss_fn = behind(BlackBox(service, batch_size=16), lambda p, t: F.nll_loss(p.log(), t))
    found = cge(module, inputs, targets, loss_fn, mu=1e-5)
    scores = nn.Linear(4, 3, bias=False).double()
    scores.weight.data = torch.from_numpy(SPRINGS.T.copy())
    exact = first_order(module, inputs, targets, lambda y, t: F.cross_entropy(scores(y), t))
    for name in found.gradients:
        torch.testing.assert_close(found.gradients[name], exact.gradients[name], rtol=1e-3, atol=1e-5)
