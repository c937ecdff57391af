"""Predictions of a step: of the module as it stands, on the machine that is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch

import configs
from deepzero_core import cge, perturb
from deepzero_core.data import prepare
from deepzero_core.perturb import Evaluator
from deepzero_core.perturb.cost import Cost
from deepzero_core.perturb.machine import Machine
from deepzero_core.training import sources
from tasks.prediction import Yardstick, work_of_a_step
from tasks.problem import problem_of
from tasks.records import Prepared


def test_the_prediction_is_what_the_estimate_then_takes(tmp_path: Path) -> None:
    prepared = Prepared.of_store(prepare("digits", home=tmp_path).path)
    for difference in ("forward", "central"):
        experiment = configs.load("smoke", [f"estimator.difference={difference}"])
        problem = problem_of(experiment, prepared)
        module, batches = problem.build_module().eval(), problem.build_batches()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        random_state = torch.get_rng_state()
        masks = {"linear.weight": torch.arange(7)}
        predicted = work_of_a_step(experiment, module, batches, masks)
        assert not module.training and torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        loss = torch.nn.functional.cross_entropy
        found = cge(module.train(), *batches.batch(0, 0), loss, coordinates=masks, difference=difference)
        assert predicted == found.work


def test_the_prediction_and_the_steps_prepare_the_module_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_for: list[torch.nn.Module] = []

    def counted(module: torch.nn.Module, *problem: Any) -> Evaluator:
        prepared_for.append(module)
        return perturb.prepare(module, *problem)

    monkeypatch.setattr(sources, "prepare", counted)
    experiment = configs.load("smoke", [])
    problem = problem_of(experiment, Prepared.of_store(prepare("digits", home=tmp_path).path))
    module, batches = problem.build_module().train(), problem.build_batches()
    source = sources.CGESource(torch.nn.functional.cross_entropy)
    predicted = work_of_a_step(experiment, module, batches, None, source.prepared)
    found = source.estimate(module, sources.Batch.of(0, 0, 0, *batches.batch(0, 0)), None)
    assert prepared_for == [module] and predicted == found.work


def test_workers_share_the_work() -> None:
    cost, machine = Cost(flops=100.0, bytes=10.0), Machine(threads=1, flops=50.0, bandwidth=10.0)
    one, two = Yardstick(machine, 1), Yardstick(machine, 2)
    assert (one.seconds(cost), two.seconds(cost)) == (3.0, 1.5)
    assert two.fields(cost, 4.0) == {"step_seconds": 4.0, "predicted_seconds": 1.5, "share_of_peak": 0.25}
    assert one.fields(Cost(), 4.0) == {}


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [(["cluster.workers=0", "training.threads=2"], 2), (["cluster.workers=1", "training.threads=2"], 1)],
)
def test_workers_compute_on_one_thread_each(overrides: list[str], threads: int) -> None:
    before = torch.get_num_threads()
    yardstick = Yardstick.of(configs.load("smoke", overrides))
    assert (yardstick.machine.threads, yardstick.workers) == (threads, 1)
    assert torch.get_num_threads() == before


def test_a_running_cluster_counts_as_the_workers_that_are_waited_for() -> None:
    overrides = ["cluster.workers=40", "cluster.address=tcp://host:8786"]
    assert Yardstick.of(configs.load("smoke", overrides)).workers == 40
