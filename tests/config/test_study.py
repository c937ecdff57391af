"""Studies as they are written: every combination is an experiment, and a wrong one is refused as a whole."""

from pathlib import Path

import pytest

import configs
from configs.loading import mapping_of
from deepzero_core.errors import RequestError

GRID = ["vary={training.method: [cge, rge], pruning.sparsity: [0.8, 0.9]}", "seeds=[3, 5]"]


def test_the_points_are_all_combinations_with_all_seeds() -> None:
    study = configs.load("smoke", GRID, flow="study")
    points = list(study.points())
    assert [(p.experiment.training.method, p.experiment.pruning.sparsity, p.experiment.seed) for p in points] == [
        (method, sparsity, seed) for method in ("cge", "rge") for sparsity in (0.8, 0.9) for seed in (3, 5)
    ]
    assert {point.experiment.name for point in points} == {"study-smoke"}
    assert points[2].values == {"training.method": "cge", "pruning.sparsity": 0.9}
    smoke = configs.load("smoke", ["training.method=rge", "pruning.sparsity=0.9", "seed=5", "name=study-smoke"])
    assert points[-1].experiment == smoke, "what is not varied is the base's"


@pytest.mark.parametrize("flow", ["defend", "solver-loop"])
def test_a_flow_with_seeds_of_its_own_gets_one_at_a_time(flow: str) -> None:
    study = configs.load("smoke", [f"flow={flow}", "vary={}", "seeds=[3, 5]"], flow="study")
    assert [point.experiment.seeds for point in study.points()] == [(3,), (5,)]


def test_without_anything_varied_the_base_is_the_point() -> None:
    (point,) = configs.load("smoke", ["vary={}", "seeds=[0]"], flow="study").points()
    assert point.label == "as it is"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("vary={training.method: [cge, cga]}", "vary training.method=cga: training.method cannot be 'cga'; did you"),
        ("vary={training.mthod: [cge]}", "vary training.mthod=cge: training.mthod is not a known key; did you mean 'm"),
        ("vary={training.steps: [3000]}", "vary training.steps=3000: training.steps: 3000 steps are more than the 8"),
        ("vary={training.method: []}", "--set vary={training.method: []}: vary.training.method must be"),
        ("vary={seed: [1, 2]}", "vary.seed: the study has a key for it: seeds, name"),
        ("seeds=[1, 1]", "seeds: a seed stands there twice"),
        ("base=dmo", "there is neither a file nor a preset for classify called 'dmo'; did you mean 'demo'?"),
        ("base=nowhere.yaml", "there is no configuration file nowhere.yaml"),
        ("base={data: {nam: digits}}", "base: data.nam is not a known key; did you mean 'name'?"),
        ("flow=study", "--set flow=study: flow cannot be 'study'; valid are: classify"),
        (f"seeds={list(range(300))}", "vary: 1,200 runs are more than the 1,000 that a study may have"),
    ],
)
def test_a_mistake_is_one_sentence(change: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        configs.load("smoke", [change], flow="study")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_file_travels_by_its_content(tmp_path: Path) -> None:
    base = tmp_path / "mine.yaml"
    base.write_text(configs.dump(configs.load("smoke", ["model.width=3"])), encoding="utf-8")
    study = configs.load("smoke", [f"base={base}"], flow="study")
    assert study.base == mapping_of(str(base))
    base.unlink()
    assert next(study.points()).experiment.model.width == 3
    file = tmp_path / "study.yaml"
    file.write_text(configs.dump(study), encoding="utf-8")
    assert configs.load(str(file), flow="study") == study


@pytest.mark.parametrize("name", configs.presets("study"))
def test_a_preset_is_valid_and_feeds_back_in_unchanged(name: str, tmp_path: Path) -> None:
    study = configs.load(name, flow="study")
    file = tmp_path / "resolved.yaml"
    file.write_text(configs.dump(study), encoding="utf-8")
    assert configs.load(str(file), flow="study") == study
