"""The training loop against a plain torch loop, its masks, budget, buffers and its refusal of what is not finite."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepzero_core import GradientEstimate, draw_masks
from deepzero_core.data import BatchSource
from deepzero_core.errors import RequestError, WorkError
from deepzero_core.sparsity import maskable_parameters
from deepzero_core.training import (
    Batch,
    CGESource,
    FirstOrderSource,
    ForwardGradientSource,
    NonFiniteError,
    RGESource,
    Schedule,
    StepRecord,
    Trainer,
    TrainingSettings,
)
from deepzero_core.training.sources import step_generator
from deepzero_core.training.trainer import build_optimizer

# torch.func.jvp loads scripted decompositions when it is used for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Build = Callable[..., nn.Module]
MakeSettings = Callable[..., TrainingSettings]
RATIOS = {"conv.weight": 0.4, "linear.weight": 0.9}


def train(module: nn.Module, batches: BatchSource, source: Any, settings: TrainingSettings) -> list[StepRecord]:
    return list(Trainer(module, batches, source, settings).run())


@pytest.mark.parametrize(
    ("optimizer", "arguments"), [("SGD", {"momentum": 0.9, "weight_decay": 5e-4}), ("Adam", {}), ("AdamW", {})]
)
def test_first_order_training_is_a_plain_torch_loop_bit_for_bit(
    network: Build, batches: BatchSource, settings: MakeSettings, optimizer: str, arguments: dict[str, Any]
) -> None:
    plan = settings(optimizer=optimizer, optimizer_arguments=arguments)
    ours, plain = network(dropout=0.0), network(dropout=0.0).train()
    records = train(ours, batches, FirstOrderSource(F.cross_entropy), plan)
    steps = getattr(torch.optim, optimizer)(plain.parameters(), lr=0.1, **arguments)
    for step, record in enumerate(records):
        inputs, targets = batches.batch(*divmod(step, batches.steps_per_epoch))
        steps.param_groups[0]["lr"] = plan.schedule.at(step)
        steps.zero_grad()
        outputs = plain(inputs)
        loss = F.cross_entropy(outputs, targets)
        loss.backward()
        steps.step()
        assert record.loss == loss.item()
        assert record.accuracy == pytest.approx((outputs.argmax(1) == targets).float().mean().item())
        assert (record.step, record.queries, record.learning_rate) == (step + 1, step + 1, plan.schedule.at(step))
        assert (record.epoch, record.epoch_ends) == (step // 3, step % 3 == 2)
    # Running statistics included: updated once per step, by that step's batch.
    for (name, mine), theirs in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(
    "source",
    [
        CGESource(F.cross_entropy),
        CGESource(F.cross_entropy, difference="central"),
        RGESource(F.cross_entropy, directions=3, seed=1),
        ForwardGradientSource(F.cross_entropy, directions=3, seed=1),
    ],
    ids=["cge", "cge-central", "rge", "forward-gradient"],
)
def test_running_statistics_are_updated_once_per_step_by_the_base_pass(
    network: Build, batches: BatchSource, settings: MakeSettings, source: Any
) -> None:
    module, seen = network(dropout=0.0), network(dropout=0.0).train()
    trainer = Trainer(module, batches, source, settings(steps=2, ratios=RATIOS))
    for step in range(2):
        seen.load_state_dict(module.state_dict())
        next(trainer.run())
        with torch.no_grad():
            seen(batches.batch(*divmod(step, 3))[0])
        assert module.norm.num_batches_tracked == step + 1
        torch.testing.assert_close(module.norm.running_mean, seen.norm.running_mean, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(module.norm.running_var, seen.norm.running_var, rtol=1e-5, atol=1e-7)


def test_cge_follows_first_order_sparse_gradients(network: Build, batches: BatchSource, settings: MakeSettings) -> None:
    """Same masks, same batches, μ small: the trajectories coincide up to O(μ)."""
    plan = settings(steps=7, ratios=RATIOS)
    estimated, exact = network(dropout=0.0).double(), network(dropout=0.0).double()
    doubled = _Double(batches)
    lines = [
        [record.loss for record in train(module, doubled, source, plan)]
        for module, source in (
            (estimated, CGESource(F.cross_entropy, mu=1e-7)),
            (exact, FirstOrderSource(F.cross_entropy)),
        )
    ]
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)
    assert abs(lines[0][-1] - lines[0][0]) > 0.05, "training has moved"
    for one, other in zip(estimated.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class _Double:
    def __init__(self, batches: BatchSource) -> None:
        self._batches = batches
        self.steps_per_epoch = batches.steps_per_epoch

    def batch(self, epoch: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self._batches.batch(epoch, index)
        return inputs.double(), targets


class Recording(FirstOrderSource):
    """Notes the coordinates that it is asked for."""

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Any) -> GradientEstimate:
        asked.append((batch, {name: mask.clone() for name, mask in coordinates.items()}))
        return super().estimate(module, batch, coordinates)


asked: list[tuple[Batch, dict[str, torch.Tensor]]] = []


@pytest.mark.parametrize("every", [1, 2])
def test_masks_are_redrawn_every_so_many_epochs_with_the_counts_of_the_ratios(
    network: Build, batches: BatchSource, settings: MakeSettings, every: int
) -> None:
    asked.clear()
    module = network()
    assert set(RATIOS) == set(maskable_parameters(module))
    train(module, batches, Recording(F.cross_entropy), settings(steps=12, ratios=RATIOS, redraw_epochs=every))
    counts = {"conv.weight": 27 - round(0.4 * 27), "linear.weight": 270 - round(0.9 * 270)}
    whole = {"conv.bias": 3, "norm.weight": 3, "norm.bias": 3, "linear.bias": 10}
    for batch, masks in asked:
        assert {name: int(mask.sum()) for name, mask in masks.items()} == counts | whole
        assert batch.epoch == batch.number // 3 and batch.index == batch.number % 3
    for (before, old), (after, new) in itertools.pairwise(asked):
        unchanged = before.epoch // every == after.epoch // every
        assert torch.equal(old["linear.weight"], new["linear.weight"]) == unchanged


def test_coordinates_that_are_not_estimated_move_only_by_weight_decay_and_momentum(
    network: Build, batches: BatchSource, settings: MakeSettings
) -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    trainer = Trainer(module, batches, CGESource(F.cross_entropy), settings(steps=1, ratios=RATIOS))
    mask = trainer.coordinates()["linear.weight"]  # type: ignore[index] # there are ratios
    rate, decay = trainer.settings.schedule.at(0), 5e-4
    list(trainer.run())
    old, new = before["linear.weight"], module.state_dict()["linear.weight"]
    torch.testing.assert_close(new[~mask], old[~mask] * (1 - rate * decay), rtol=1e-6, atol=0)
    assert not torch.isclose(new[mask], old[mask] * (1 - rate * decay), rtol=1e-6).all()


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop"])
def test_masked_weights_stay_zero(network: Build, batches: BatchSource, settings: MakeSettings, optimizer: str) -> None:
    module = network()
    masks = {
        name: mask
        for name, mask in draw_masks(RATIOS, module, torch.Generator().manual_seed(0)).items()
        if name in RATIOS
    }
    plan = settings(optimizer=optimizer, optimizer_arguments={}, weight_masks=masks)
    trainer = Trainer(module, batches, FirstOrderSource(F.cross_entropy), plan)
    started = copy.deepcopy(module.state_dict())
    for name, mask in masks.items():
        assert not module.get_parameter(name)[~mask].any(), "from the start"
    for _ in trainer.run():
        for name, mask in masks.items():
            weights = module.get_parameter(name)
            assert not weights[~mask].any()
            assert weights[mask].all()
    assert not torch.equal(started["linear.weight"], module.state_dict()["linear.weight"])


@pytest.mark.parametrize("short", [0, 1])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_the_query_budget_is_never_exceeded(
    network: Build, batches: BatchSource, settings: MakeSettings, difference: str, short: int
) -> None:
    module = network()
    source = CGESource(F.cross_entropy, difference=difference)
    plan = settings(steps=7, ratios=RATIOS)
    cost = source.cost(module, Trainer(module, batches, source, plan).coordinates())
    assert cost == 1 + (16 + 27 + 19) * (2 if difference == "central" else 1)
    plan = settings(steps=7, ratios=RATIOS, query_budget=3 * cost - short)
    trainer = Trainer(module, batches, source, plan)
    records = list(trainer.run())
    assert [record.queries for record in records] == [cost * step for step in range(1, 4 - short)]
    assert trainer.queries <= 3 * cost - short
    assert not trainer.budget_left
    assert list(trainer.run()) == [], "and going on spends nothing more"


def test_a_budget_below_one_step_trains_nothing(network: Build, batches: BatchSource, settings: MakeSettings) -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    source = RGESource(F.cross_entropy, directions=5, seed=0)
    assert train(module, batches, source, settings(query_budget=5)) == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Breaking(FirstOrderSource):
    """Turns the gradient or the loss of step 3 into something that is no number."""

    def __init__(self, where: str) -> None:
        super().__init__(F.cross_entropy)
        object.__setattr__(self, "where", where)

    def estimate(self, module: nn.Module, batch: Batch, coordinates: Any) -> GradientEstimate:
        estimate = super().estimate(module, batch, coordinates)
        if batch.number < 2:
            return estimate
        if self.where == "loss":
            return GradientEstimate(estimate.gradients, 1, math.nan, estimate.outputs, estimate.buffers)
        estimate.gradients["linear.bias"][4] = math.inf
        return estimate


@pytest.mark.parametrize(
    ("where", "message"), [("loss", "the loss is nan"), ("gradient", "the gradient of 'linear.bias' is not finite")]
)
def test_what_is_not_finite_stops_before_the_step(
    network: Build, batches: BatchSource, settings: MakeSettings, where: str, message: str
) -> None:
    module = network()
    trainer = Trainer(module, batches, Breaking(where), settings())
    run = trainer.run()
    next(run)
    next(run)
    before = copy.deepcopy(trainer.state())
    with pytest.raises(NonFiniteError, match=rf"step 3: {message} \(learning rate 0.1\); try .*training.optimizer.lr"):
        next(run)
    assert trainer.step == 2 and trainer.queries == 2
    for name, value in trainer.state()["module"].items():
        assert torch.equal(value, before["module"][name]), name
    assert issubclass(NonFiniteError, WorkError)


def test_an_exploding_learning_rate_is_told(network: Build, batches: BatchSource, settings: MakeSettings) -> None:
    plan = settings(schedule=Schedule(1e25, 7, 0), steps=7)
    with pytest.raises(NonFiniteError, match=r"step \d: .*(is nan|is inf|is not finite) \(learning rate"):
        train(network(), batches, CGESource(F.cross_entropy), plan)


def test_the_trainer_leaves_the_global_random_numbers_alone(
    network: Build, batches: BatchSource, settings: MakeSettings
) -> None:
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    for source in (CGESource(F.cross_entropy), FirstOrderSource(F.cross_entropy), RGESource(F.cross_entropy, 2, 0)):
        train(network(), batches, source, settings(steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_frozen_parameters_stay(network: Build, batches: BatchSource, settings: MakeSettings) -> None:
    module = network()
    module.conv.weight.requires_grad_(False)
    before = module.conv.weight.clone()
    for source in (CGESource(F.cross_entropy), FirstOrderSource(F.cross_entropy), RGESource(F.cross_entropy, 2, 0)):
        train(module, batches, source, settings(steps=2))
        assert torch.equal(module.conv.weight, before)


def test_unknown_optimizers_and_arguments_are_refused(network: Build) -> None:
    with pytest.raises(RequestError, match=r"unknown optimizer 'Adm': did you mean 'Adam'"):
        build_optimizer(network(), "Adm", 0.1, {})
    with pytest.raises(RequestError, match=r"unknown optimizer 'Optimizer'"):
        build_optimizer(network(), "Optimizer", 0.1, {})
    with pytest.raises(RequestError, match=r"optimizer SGD does not take these arguments: .*momentun"):
        build_optimizer(network(), "SGD", 0.1, {"momentun": 0.9})


def test_step_generators_are_a_function_of_seed_and_counters() -> None:
    def draw(*counters: int) -> tuple[float, ...]:
        return tuple(torch.rand(2, generator=step_generator(*counters)).tolist())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    streams = [(seed, kind, step) for seed in range(8) for kind in range(4) for step in range(32)]
    assert len({draw(*stream) for stream in streams}) == len(streams)
    assert draw(2**63 - 1, 0) != draw(2**63 - 2, 0)
