"""What a defence may be told, and what is said of mistakes."""

from pathlib import Path

import pytest

import configs
from configs.defence import Defence
from configs.defence_checks import DENOISERS
from configs.facts import BLACK_BOXES
from deepzero_core.errors import RequestError


def load(*overrides: str, name: str = "smoke") -> Defence:
    experiment = configs.load(name, overrides, flow="defend")
    assert isinstance(experiment, Defence)
    return experiment


@pytest.mark.parametrize("name", configs.presets("defend"))
def test_a_preset_is_valid_and_feeds_back_in_unchanged(name: str, tmp_path: Path) -> None:
    experiment = load(name=name)
    file = tmp_path / "resolved.yaml"
    file.write_text(configs.dump(experiment), encoding="utf-8")
    assert load(name=str(file)) == experiment


def test_every_flow_has_presets_of_its_own() -> None:
    assert "paper" not in configs.presets("defend") and "paper" in configs.presets("classify")
    with pytest.raises(RequestError, match=r"neither a file nor a preset for defend called 'papr'"):
        load(name="papr")


OWN = ("victim.kind=http", "baselines=[none]")
CASES = {
    "unknown key": (["training.query=3"], "training.query is not a known key; did you mean 'queries'?"),
    "key of an experiment": (["estimator.mu=3"], "estimator is not a known key"),
    "unknown method": (["training.method=zo-d"], "training.method cannot be 'zo-d'; did you mean 'zo-ds'?"),
    "unknown baseline": (["baselines=[fods]"], "baselines.0 cannot be 'fods'; did you mean 'fo-ds'?"),
    "twice": (["baselines=[none, none]"], "baselines.1: 'none' stands there twice"),
    "main method again": (["baselines=[deepzero]"], "'deepzero' is what is trained already"),
    "white box of a black one": (
        [OWN[0], "victim.settings={url: 'http://a'}"],
        "'fo-ds' differentiates the classifier",
    ),
    "no address": ([*OWN], "victim.settings.url: a classifier of kind 'http' needs it"),
    "unknown setting": (
        [*OWN, "victim.settings={url: 'http://a', patients: 3}"],
        "victim.settings.patients: a classifier of kind 'http' has no such setting; did you mean 'patience'?",
    ),
    "setting with a key of its own": (
        [*OWN, "victim.settings={url: 'http://a', budget: 3}"],
        "it is victim.budget",
    ),
    "secret in an address": (
        [*OWN, "victim.settings={url: 'http://me:secret@a'}"],
        "victim.settings.url: a password does not belong into an address",
    ),
    "secret in a query": (
        [*OWN, "victim.settings={url: 'http://a/score?model=7&api_key=canary'}"],
        "victim.settings.url: 'api_key' looks like a secret",
    ),
    "secret in a header": (
        [*OWN, "victim.settings={url: 'http://a', headers: {X-Api-Key: canary}}"],
        "victim.settings.headers: 'X-Api-Key' looks like a secret",
    ),
    "black box on many machines": (
        [*OWN, "victim.settings={url: 'http://a'}", "cluster.workers=2", "cluster.spec=slurm"],
        "cluster.spec: what a classifier of kind 'http' is asked is counted on this machine",
    ),
    "budget of a classifier trained here": (["victim.budget=3"], "victim.budget: it is for a classifier of your own"),
    "unknown kind": (["victim.kind=https"], "victim.kind cannot be 'https'; did you mean 'http'?"),
    "unknown network": (["victim.model.name=cn"], "victim.model.name: there is no model 'cn'; did you mean 'cnn'?"),
    "too deep": (["victim.model.depth=9"], "victim.model.depth: every block halves the image"),
    "unknown denoiser": (["denoiser.name=dncn"], "denoiser.name: there is no denoiser 'dncn'; did you mean 'dncnn'?"),
    "augmented": (["data.flip=true"], "data.flip: the classifier's labels belong to the images as they are"),
    "sigma": (["certification.sigma=0"], "certification.sigma must be greater than 0, but is 0"),
    "one query": (["training.queries=1"], "training.queries: a step needs at least 2 queries"),
    "seeds twice": (["seeds=[1, 1]"], "seeds: a seed stands there twice"),
    "no seed": (["seeds=[]"], "seeds"),
    "learning rate of nobody": (
        ["training.lr.zo-ds=.1", "baselines=[]"],
        "training.lr.zo-ds: this method is not trained",
    ),
    "optimizer": (["training.optimizer.name=Adan"], "torch.optim has no optimizer 'Adan'; did you mean 'Adam'?"),
    "batch beyond the data": (["data.batch_size=4000"], "a batch of 4000 cannot be filled"),
}


@pytest.mark.parametrize(("overrides", "expected"), CASES.values(), ids=CASES)
def test_a_mistake_is_one_sentence(overrides: list[str], expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        load(*overrides)
    assert expected in str(caught.value)
    assert "canary" not in str(caught.value)


def test_the_kinds_of_classifier_and_their_settings_are_those_of_the_core() -> None:
    from deepzero_core.oracle import KINDS, settings_of

    elsewhere = {"answers", "batch_size", "budget", "classes", "price_per_thousand"}
    elsewhere |= {"examples_per_second", "calls_per_second"}
    not_plain = {"on_retry", "sleep"}
    assert set(BLACK_BOXES) == set(KINDS)
    for kind, (needed, optional) in BLACK_BOXES.items():
        known = settings_of(kind)
        assert {needed, *optional} == set(known) - elsewhere - not_plain, kind
        assert [key for key, must in known.items() if must] == [needed]


def test_the_denoisers_are_those_of_the_core() -> None:
    from deepzero_core import models

    assert DENOISERS == models.DENOISERS
