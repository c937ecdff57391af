"""The presets say what they promise, and what is written can be read again."""

from pathlib import Path

import pytest

import configs
from configs.checks import steps_per_epoch
from configs.facts import DATA_SETS, MODELS
from deepzero_core.errors import RequestError

PRESETS = ("cifar10-cnn", "demo", "paper", "smoke")


def test_the_presets_are_these() -> None:
    assert set(PRESETS) <= set(configs.presets())


@pytest.mark.parametrize("name", configs.presets())
def test_a_preset_is_valid_and_feeds_back_in_unchanged(name: str, tmp_path: Path) -> None:
    experiment = configs.load(name)
    assert experiment.name == name
    file = tmp_path / "resolved.yaml"
    file.write_text(configs.dump(experiment), encoding="utf-8")
    assert configs.load(str(file)) == experiment
    assert configs.dump(configs.load(str(file))) == configs.dump(experiment)


def test_paper_has_the_settings_of_the_paper() -> None:
    paper = configs.load("paper")
    assert (paper.model.name, paper.data.name, paper.data.batch_size) == ("resnet20", "cifar10", 256)
    assert (paper.data.crop_padding, paper.data.flip) == (4, True)
    assert (paper.pruning.method, paper.pruning.sparsity, paper.pruning.queries) == ("zo-grasp", 0.9, 192)
    assert (paper.pruning.samples_per_class, paper.pruning.redraw_epochs, paper.estimator.mu) == (25, 1, 5e-3)
    assert paper.estimator.precision == "value", "perturbed values, not changes beside cached ones"
    training = paper.training
    assert (training.method, training.epochs, training.schedule.warmup_epochs) == ("cge", 50, 3)
    assert (training.optimizer.name, training.optimizer.lr) == ("SGD", 0.1)
    assert training.optimizer.arguments == {"momentum": 0.9, "weight_decay": 5e-4}
    certification = paper.certification
    assert (certification.sigma, certification.n0, certification.n, certification.alpha) == (0.25, 100, 10_000, 0.001)


def test_cifar10_cnn_trains_the_papers_cnn_for_200_steps() -> None:
    experiment = configs.load("cifar10-cnn")
    assert (experiment.model.name, experiment.model.depth, experiment.data.name) == ("cnn", 2, "cifar10")
    per_epoch = steps_per_epoch(experiment)
    assert per_epoch == 390
    assert experiment.training.steps == 200 <= per_epoch * experiment.training.epochs
    assert experiment.baselines == ("first-order-sparse-gradients",)


def test_the_precisions_are_those_of_the_engine() -> None:
    from typing import get_args

    from configs.schema import EstimatorConfig, Precision
    from deepzero_core.perturb.estimate import PRECISIONS

    assert set(get_args(Precision)) == set(PRECISIONS)
    assert EstimatorConfig().precision == "float32"
    for precision in PRECISIONS:
        assert configs.load("demo", [f"estimator.precision={precision}"]).estimator.precision == precision


def test_a_file_without_a_name_is_called_like_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my-run.yaml"
    file.write_text("seed: 3\n", encoding="utf-8")
    assert (configs.load(str(file)).name, configs.load(str(file)).seed) == ("my-run", 3)


def test_an_existing_file_wins_over_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").write_text("seed: 77\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert configs.load("demo").seed == 77


def test_the_experiment_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        configs.load("demo").seed = 4  # type: ignore[misc]  # that it cannot be set is the point


def test_what_is_known_of_the_data_sets_agrees_with_the_sources() -> None:
    from deepzero_core.data import available

    assert {source.name for source in available()} == set(DATA_SETS)


def test_what_is_known_of_the_digits_agrees_with_their_store(tmp_path: Path) -> None:
    from deepzero_core.data import ImageStore, prepare

    manifest = ImageStore.open(prepare("digits", home=tmp_path)).manifest
    facts = DATA_SETS["digits"]
    assert manifest.counts["train"] == facts.train
    assert manifest.image_shape[1:] == (facts.image_size, facts.image_size)
    assert len(manifest.class_names) == facts.classes


def test_the_models_are_those_that_can_be_built() -> None:
    from deepzero_core.models.build import BUILT_IN

    assert set(MODELS) == set(BUILT_IN)


def test_a_model_deeper_than_its_images_is_refused_by_config_and_core_alike() -> None:
    from deepzero_core.models import build_model

    for depth in range(1, 5):
        try:
            configs.load("demo", [f"model.depth={depth}"])
            accepted = True
        except RequestError:
            accepted = False
        try:
            build_model("cnn", in_channels=1, num_classes=10, image_size=8, depth=depth)
            built = True
        except RequestError:
            built = False
        assert accepted == built
