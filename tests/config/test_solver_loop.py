"""What a solver in the loop may be told, and what is said of mistakes."""

import inspect
from pathlib import Path

import pytest

import configs
from configs.facts import CORRECTORS, LOWEST_REYNOLDS, SIMULATORS
from configs.solver_loop import SolverLoop
from deepzero_core.errors import RequestError


def load(*overrides: str, name: str = "smoke") -> SolverLoop:
    experiment = configs.load(name, overrides, flow="solver-loop")
    assert isinstance(experiment, SolverLoop)
    return experiment


@pytest.mark.parametrize("name", configs.presets("solver-loop"))
def test_a_preset_is_valid_and_feeds_back_in_unchanged(name: str, tmp_path: Path) -> None:
    experiment = load(name=name)
    file = tmp_path / "resolved.yaml"
    file.write_text(configs.dump(experiment), encoding="utf-8")
    assert load(name=str(file)) == experiment


def test_there_are_the_presets_that_the_documentation_names() -> None:
    assert set(configs.presets("solver-loop")) == {"demo", "smoke", "wake", "paper"}


def test_what_is_left_of_the_steps_is_for_the_longest_loop() -> None:
    assert load("training.steps=9").stages == ((2, 2), (7, 3))


OWN = (
    "simulator={kind: external, field: u, settings: {command: [a], state_shapes: {u: [4]}}}",
    "corrector.name=my.networks:corrector",
    "cases.function=my.cases:make",
    "baselines=[src]",
)
CASES = {
    "unknown key": (["training.query=3"], "training.query is not a known key; did you mean 'queries'?"),
    "key of an experiment": (["data.name=digits"], "data is not a known key"),
    "unknown method": (["training.method=sol-zoo"], "training.method cannot be 'sol-zoo'; did you mean 'sol-zo'?"),
    "twice": (["baselines=[src, src]"], "baselines.1: 'src' stands there twice"),
    "main method again": (["baselines=[sol-zo]"], "'sol-zo' is what is trained already"),
    "unknown kind": (["simulator.kind=burger"], "simulator.kind cannot be 'burger'; did you mean 'burgers'?"),
    "burgers not square": (["simulator.cells=[8, 16]"], "the domain of burgers is square"),
    "wake not long": (["simulator={kind: wake, cells: [8, 8]}"], "the channel is twice as long as wide"),
    "too coarse": (["simulator.cells=[2, 2]"], "too coarse: at least 4"),
    "settings of nobody": (["simulator.settings={a: 1}"], "simulator.settings: it is for your own simulator"),
    "half a seed": (["cases.train=[0.5]"], "cases.train: seeds are whole numbers"),
    "seed on both sides": (["cases.test=[0]"], "cases.test: 0 is a training case, too"),
    "validation on trial": (["cases.validation=[100]"], "cases.test: 100 is a validation case, too"),
    "validation in training": (["cases.validation=[1]"], "cases.validation: 1 is a training case, too"),
    "case twice": (["cases.train=[1, 1]"], "cases.train: a case stands there twice"),
    "viscous": (
        ["simulator={kind: wake, cells: [16, 8]}", "cases.train=[50]"],
        "Reynolds numbers of the wake are at least 97.7, not 50",
    ),
    "few frames": (["cases.frames=3", "rollout.frames=1"], "a loop of 3 steps needs at least 4 frames"),
    "rolled out too far": (["rollout.frames=8"], "rollout.frames: 8 frames of a case"),
    "cases of burgers": (["cases.function=a:b"], "cases.function: it is for your own simulator"),
    "unknown corrector": (["corrector.name=smal"], "there is no corrector 'smal'; did you mean 'small'?"),
    "arguments of ours": (["corrector.arguments={width: 3}"], "'small' takes none"),
    "no callable": (["corrector.name='a:'"], "does not have the form package.module:callable"),
    "learning rate of nobody": (["training.lr.non=.1", "baselines=[]"], "this method is not trained"),
    "mu of first order": (["training.mu.sol-fo=.1"], "only sol-zo and sol-zo-split have finite differences"),
    "one query": (["training.queries=1"], "a step needs at least 2 queries"),
    "seeds twice": (["seeds=[1, 1]"], "seeds: a seed stands there twice"),
    "curriculum too long": (["training.steps=2"], "it takes 2 of 2 steps and leaves none for training.unroll"),
    "optimizer": (["training.optimizer.name=Adan"], "torch.optim has no optimizer 'Adan'; did you mean 'Adam'?"),
    "no field": ([*OWN, "simulator.field=null"], "simulator.field: name the field of the state"),
    "unknown field": ([*OWN, "simulator.field=v"], "the state has no field 'v'"),
    "no command": (["simulator={kind: external, field: u}"], "simulator.settings.command: a simulator of kind"),
    "unknown setting": ([*OWN, "simulator.settings.timeot=3"], "no such setting; did you mean 'timeout'?"),
    "no shape": ([*OWN, "simulator.settings.state_shapes={u: four}"], "the shape of one simulation"),
    "derivative of a program": ([*OWN[:3], "baselines=[sol-fo]"], "a program cannot be differentiated"),
    "no cases": ([*OWN, "cases.function=null"], "your own simulator needs your own cases"),
    "velocities in the plane": ([*OWN, "corrector.name=small"], "'small' corrects velocities in the plane"),
    "viscosity of one's own": ([*OWN, "simulator.viscosity=3"], "your own simulator has its settings"),
}


@pytest.mark.parametrize(("overrides", "expected"), CASES.values(), ids=CASES)
def test_a_mistake_is_one_sentence(overrides: list[str], expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        load(*overrides)
    assert expected in str(caught.value)


def test_ones_own_program_is_a_valid_experiment() -> None:
    assert load(*OWN).simulator.kind == "external"


def test_what_is_known_of_simulators_is_true() -> None:
    from deepzero_core.models.corrector import CORRECTORS as BUILT
    from simulators.external import ExternalProgram
    from simulators.function import FunctionSimulator
    from simulators.wake import TRAIN_REYNOLDS

    assert set(CORRECTORS) == set(BUILT)
    assert min(TRAIN_REYNOLDS) == LOWEST_REYNOLDS
    for kind, simulator in {"external": ExternalProgram, "function": FunctionSimulator}.items():
        parameters = list(inspect.signature(simulator).parameters.values())
        needed, optional = SIMULATORS[kind]
        assert {p.name for p in parameters} == {*needed, *optional}, kind
        assert {p.name for p in parameters if p.default is p.empty} == set(needed), kind
