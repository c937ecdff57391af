"""The cost model against arithmetic by hand, and what is done when memory runs out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepzero_core import cge
from deepzero_core.perturb import BasePass, Chunk, Evaluator, engine, prepare
from deepzero_core.perturb.cost import Cost, total
from deepzero_core.perturb.evaluator import Situation, within_memory, work_of
from deepzero_core.perturb.machine import NOMINAL, Machine, measured
from deepzero_core.perturb.objective import state_of
from deepzero_core.perturb.rules.elementwise import rule_for

BATCH, SIDE = 3, 8
FLOAT64 = 8
MEMORY = 1 << 25


def per_example(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten(1)[:, 0] - targets


def prepared(module: nn.Module, inputs: Tensor, loss: Any = per_example) -> tuple[Evaluator, BasePass]:
    problem = (inputs, torch.zeros(len(inputs)).to(inputs))
    evaluator = prepare(module, *problem, loss)
    return evaluator, evaluator.base(*state_of(module), *problem)


def convolutions() -> tuple[Evaluator, BasePass]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 16, 5, padding=2)).double()
    return prepared(module, torch.randn(BATCH, 2, SIDE, SIDE, dtype=torch.float64))


def test_operations_of_two_convolutions_by_hand() -> None:
    """The owner writes one channel, the rectifier too; the next layer reads one of its four input channels."""
    evaluator, base = convolutions()
    plane = BATCH * SIDE * SIDE
    first, second = evaluator.cost(base, "0.weight"), evaluator.cost(base, "2.weight")
    assert first["owner"] == Cost(2 * plane, FLOAT64 * plane)
    assert first["thin"] == Cost(2 * plane, FLOAT64 * plane * 2)
    products = 2 * 5 * 5 * 16 * plane
    assert products <= first["dense"].flops < 1.1 * products, "beside it there is only the loss"
    assert second["owner"] == Cost(2 * plane, FLOAT64 * plane)
    assert evaluator.cost(base, "0.bias")["dense"] == first["dense"]


def test_operations_of_a_dense_stretch_by_hand() -> None:
    """Behind two convolutions all 16 channels move, and all are read."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 5, padding=2)
    ).double()
    evaluator, base = prepared(module, torch.randn(BATCH, 2, SIDE, SIDE, dtype=torch.float64))
    plane = BATCH * SIDE * SIDE
    products = 2 * 16 * plane * (3 * 3 + 16 * 5 * 5)
    assert products <= evaluator.cost(base, "0.weight")["dense"].flops < 1.01 * products


def test_operations_of_linear_layers_by_hand() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 40), nn.Linear(40, 30)).double()
    evaluator, base = prepared(module, torch.randn(BATCH, 6, dtype=torch.float64))
    first, second = evaluator.cost(base, "0.weight"), evaluator.cost(base, "2.weight")
    products = 2 * BATCH * 40 * 1, 2 * BATCH * 30 * 40
    # The first two layers and what is between them are one operator, and all of it the owner's.
    assert sum(products) <= total(first).flops < 1.1 * sum(products), "one column of 50, then all of 40"
    assert 2 * BATCH * 30 <= second["dense"].flops < 0.1 * first["dense"].flops, "one column of 40"


def test_work_counts_every_coordinate_once() -> None:
    evaluator, base = convolutions()
    one = total(evaluator.cost(base, "0.weight"))
    found = work_of(evaluator, base, {"0.weight": torch.arange(10)}, MEMORY)
    assert replace(found, starts=0) == one * 10
    both = work_of(evaluator, base, {"0.weight": torch.arange(10), "2.bias": torch.arange(4)}, MEMORY)
    assert replace(both, starts=0) == one * 10 + total(evaluator.cost(base, "2.bias")) * 4
    assert work_of(evaluator, base, {"0.weight": torch.arange(0)}, MEMORY) == Cost()


def test_an_estimate_says_what_it_took() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    problem = (module, torch.randn(20, 1, 4, 4), torch.randint(2, (20,)), F.cross_entropy)
    few, more = ({"0.weight": torch.arange(count)} for count in (5, 10))
    forward = cge(*problem, coordinates=few).work
    assert forward.flops > 0 and forward.bytes > 0
    assert cge(*problem, coordinates=more).work == replace(forward * 2, starts=forward.starts), "one chunk, too"
    assert cge(*problem, coordinates=few, difference="central").work == forward * 2


def test_a_prediction_grows_with_what_is_left_of_the_network() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(4)]
    evaluator, base = prepared(nn.Sequential(*blocks), torch.randn(16, 6, 8, 8))
    predicted = [total(evaluator.cost(base, f"{place}.0.weight")).seconds(NOMINAL) for place in range(4)]
    assert predicted == sorted(predicted, reverse=True) and predicted[-1] > 0
    assert set(evaluator.cost(base, "0.0.weight")) == {"owner", "thin", "dense"}


def test_time_is_operations_and_traffic() -> None:
    machine = Machine(threads=1, flops=100.0, bandwidth=10.0)
    assert Cost(200.0, 5.0, 3.0).seconds(machine) == 2.5
    assert Cost(200.0, 5.0, 3.0).seconds(replace(machine, start=0.5)) == 4.0
    assert (Cost(1, 2, 3) + Cost(3, 4, 5)) * 2 == Cost(8, 12, 16)


def test_the_machine_is_measured_once() -> None:
    found = measured()
    assert found is measured() and found.threads == torch.get_num_threads()
    assert found.flops > 1e8 and found.bandwidth > 1e8 and 1e-6 < found.start < 1e-2


def test_operators_are_started_once_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as they answer: the convolution's own, the rectifier, the convolution, and the loss."""
    evaluator, base = convolutions()
    indices = torch.arange(40)
    whole = work_of(evaluator, base, {"0.weight": indices}, 1 << 40).starts
    each = work_of(evaluator, base, {"0.weight": indices}, 0).starts
    nodes = len(evaluator._trace.reads["0.weight"])  # type: ignore[attr-defined]
    answered: list[object] = []
    monkeypatch.setattr(engine, "rule_for", lambda target: answered.append(target) or rule_for(target))
    evaluator.coordinates(base, Chunk("0.weight", indices), 1e-3)
    assert whole == nodes + len(answered) and each == nodes + 40 * len(answered)


class BranchOnValues(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -y


def test_separate_passes_cost_a_whole_pass_each() -> None:
    with pytest.warns(UserWarning, match="cannot be traced"):
        evaluator, base = prepared(BranchOnValues(), torch.randn(BATCH, 6))
    assert evaluator.cost(base, "linear.weight")["dense"].flops == 2 * BATCH * 6 * 5


def test_separate_passes_are_counted_in_one_pass_for_good() -> None:
    class Counted(BranchOnValues):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(x)

    module, inputs, targets = Counted(), torch.randn(BATCH, 6), torch.randint(5, (BATCH,))
    with pytest.warns(UserWarning, match="cannot be traced"):
        evaluator = prepare(module, inputs, targets, F.cross_entropy)
    passes = []
    for _ in range(2):
        module.passes = 0
        spent = cge(module, inputs, targets, F.cross_entropy, evaluator=evaluator).queries
        passes.append(module.passes - spent)
    assert passes == [1, 0]


# Memory


@dataclass(frozen=True)
class Narrow:
    """An evaluator on a machine where more than `most` perturbations at once do not fit."""

    inner: Evaluator
    most: int
    by_allocator: bool = False

    @property
    def situation(self) -> Situation:
        return self.inner.situation

    untraced = None

    def base(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> BasePass:
        return self.inner.base(parameters, buffers, inputs, targets)

    def coordinates(self, base: BasePass, chunk: Chunk, step: float, precision: str = "float32") -> Tensor:
        if len(chunk.indices) > self.most:
            if self.by_allocator:
                torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has
            raise torch.OutOfMemoryError("no memory")
        return self.inner.coordinates(base, chunk, step, precision)

    def chunk_size(self, base: BasePass, name: str, memory: int) -> int:
        return self.inner.chunk_size(base, name, memory)

    def cost(self, base: BasePass, name: str) -> dict[str, Cost]:
        return self.inner.cost(base, name)

    def starts(self, base: BasePass, name: str, chunks: int) -> int:
        return self.inner.starts(base, name, chunks)


@pytest.mark.parametrize("by_allocator", [False, True])
def test_where_memory_runs_out_halves_give_the_same_answer(by_allocator: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    problem = (module, torch.randn(4, 6, dtype=torch.float64), torch.randint(3, (4,)), F.cross_entropy)
    narrow = Narrow(prepare(*problem), most=8, by_allocator=by_allocator)
    with pytest.warns(UserWarning, match=r"out of memory with \d+ coordinates of \d.weight at once") as said:
        found = cge(*problem, evaluator=narrow).gradients
    assert [str(warning.message).split()[4] for warning in said] == ["30", "15", "15", "15"]
    for name, gradient in cge(*problem).gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=0)


def test_one_coordinate_that_does_not_fit_is_an_error() -> None:
    evaluator, base = convolutions()
    narrow = Narrow(evaluator, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        within_memory(narrow, base, Chunk("0.weight", torch.arange(1)), 1e-3)


def test_another_failure_is_not_taken_for_memory() -> None:
    class Broken(Narrow):
        def coordinates(self, base: BasePass, chunk: Chunk, step: float, precision: str = "float32") -> Tensor:
            raise RuntimeError("something else")

    evaluator, base = convolutions()
    with pytest.raises(RuntimeError, match="something else"):
        within_memory(Broken(evaluator, 1), base, Chunk("0.weight", torch.arange(4)), 1e-3)


def test_chunks_fill_the_budget_and_no_more() -> None:
    """A dense change is [P, 3, 16, 8, 8] of float64."""
    evaluator, base = convolutions()
    widest = FLOAT64 * prod((BATCH, 16, SIDE, SIDE))
    sizes = [evaluator.chunk_size(base, "0.weight", memory) for memory in (1, 10 * widest, 20 * widest)]
    assert sizes[0] == 1
    assert 5 <= sizes[1] <= 10 and sizes[2] in (2 * sizes[1], 2 * sizes[1] + 1)
