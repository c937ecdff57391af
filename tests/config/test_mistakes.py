"""Every mistake ends in one sentence with the key, the reason and what would be right."""

from pathlib import Path

import pytest

import configs
from deepzero_core.errors import RequestError


def message(*overrides: str, name: str = "demo") -> str:
    with pytest.raises(RequestError) as caught:
        configs.load(name, overrides)
    return str(caught.value)


CASES = {
    # unknown names
    "unknown key": (["training.epoch=3"], "training.epoch is not a known key; did you mean 'epochs'?"),
    "unknown section": (["trainin.epochs=3"], "trainin is not a known key; did you mean 'training'?"),
    "unknown data set": (["data.name=cifar"], "data.name: there is no data set 'cifar'; did you mean 'cifar10'?"),
    "unknown model": (["model.name=rsnet20"], "model.name: there is no model 'rsnet20'; did you mean 'resnet20'?"),
    "malformed callable": (
        ["model.name=a..b:c"],
        "model.name: 'a..b:c' does not have the form package.module:callable",
    ),
    "unknown method": (["training.method=cg"], "training.method cannot be 'cg'; did you mean 'cge'?"),
    "unknown baseline": (["baselines=[first-orde]"], "baselines.0 cannot be 'first-orde'; did you mean 'first-order'?"),
    "unknown pruning": (["pruning.method=grasb"], "pruning.method cannot be 'grasb'; did you mean 'grasp'?"),
    "unknown optimizer": (
        ["training.optimizer.name=Adan"],
        "torch.optim has no optimizer 'Adan'; did you mean 'Adam'?",
    ),
    "optimizer in small letters": (["training.optimizer.name=sgd"], "did you mean 'SGD'?"),
    # wrong types
    "text for a number": (["training.epochs=many"], "training.epochs must be a whole number, but is 'many'"),
    "fraction for a count": (["training.epochs=2.5"], "training.epochs must be a whole number, but is 2.5"),
    "truth value for a count": (["pruning.queries=true"], "pruning.queries must be a whole number, but is true"),
    "number for a truth value": (["data.flip=1"], "data.flip must be true or false, but is 1"),
    "number for a name": (["data.name=3"], "data.name must be text, but is 3"),
    "number for a section": (["training=3"], "training must be a mapping of keys, but is the number 3"),
    "number for a list": (["certification.radii=3"], "certification.radii must be a list, but is 3"),
    "infinite": (["training.optimizer.lr=.inf"], "training.optimizer.lr must be a finite number"),
    "infinite argument": (["training.optimizer.arguments.momentum=.nan"], "a number in it is not finite"),
    "name for file names": (["name=a/b"], "name must consist of letters, digits"),
    # out of range
    "sparsity 1": (["pruning.sparsity=1"], "pruning.sparsity must be less than 1, but is 1"),
    "sparsity below 0": (["pruning.sparsity=-.1"], "pruning.sparsity must be greater than or equal to 0, but is -0.1"),
    "mu": (["estimator.mu=0"], "estimator.mu must be greater than 0, but is 0"),
    "precision": (["estimator.precision=float61"], "estimator.precision cannot be 'float61'; did you mean"),
    "mu of pruning": (["pruning.mu=-1e-3"], "pruning.mu must be greater than 0, but is -0.001"),
    "sigma": (["certification.sigma=0"], "certification.sigma must be greater than 0"),
    "alpha": (["certification.alpha=1"], "certification.alpha must be less than 1"),
    "query budget": (["training.query_budget=0"], "training.query_budget must be greater than or equal to 1"),
    "seed": (["seed=-1"], "seed must be greater than or equal to 0"),
    # impossible combinations
    "warm-up beyond the epochs": (["training.epochs=2"], "a warm-up of 3 epochs is longer than the run of 2"),
    "warm-up beyond the steps": (["training.steps=20"], "a warm-up of 3 epochs, 66 steps, is longer than the run"),
    "steps beyond the epochs": (["training.steps=1000000"], "training.steps: 1000000 steps are more than"),
    "sparse method without masks": (
        ["pruning.method=none", "training.method=first-order-sparse-weights", "baselines=[]"],
        "training.method: 'first-order-sparse-weights' needs masks, but pruning.method is 'none'",
    ),
    "sparse baseline without masks": (
        ["pruning.method=none"],
        "baselines.1: 'first-order-sparse-gradients' needs masks",
    ),
    "baseline twice": (["baselines=[rge, rge]"], "baselines.1: 'rge' stands there twice"),
    "baseline trained already": (["baselines=[cge]"], "baselines.0: 'cge' is what is trained already"),
    "too deep": (["model.depth=4"], "model.depth: every block halves the image, so that 4 blocks are too many for 8x8"),
    "arguments of a built-in model": (["model.arguments.a=1"], "model.arguments: model 'cnn' takes none"),
    "batch beyond the data": (["data.batch_size=2000"], "a batch of 2000 cannot be filled from 1437 training examples"),
    "batch beyond the limit": (
        ["data.train_limit=50", "pruning.samples_per_class=5"],
        "a batch of 64 cannot be filled",
    ),
    "samples beyond the data": (["pruning.samples_per_class=200"], "200 samples of 10 classes are more than the 1437"),
    "padding": (["data.crop_padding=8"], "data.crop_padding: 8 pixels of padding can push images of 8 pixels out"),
    "source of embedded data": (["data.source=/tmp"], "data.source: data set 'digits' is embedded"),
    "own files without source": (["data.name=npz"], "data.source: data set 'npz' is made from your own files"),
    "size without folder": (["data.image_size=16"], "data.image_size: the images of 'digits' have a size of their own"),
    "budget below one step": (
        ["training.method=rge", "training.query_budget=100"],
        "training.query_budget: 100 queries do not pay for one step of rge, which spends 192",
    ),
    "certificate out of reach": (["certification.n=9"], "9 samples cannot certify anything at alpha=0.001"),
    "certificate out of reach, adaptive": (
        ["certification.n=10", "certification.adaptive=true"],
        "10 samples cannot certify anything at alpha=0.001, even if all agree; at least 11 are needed",
    ),
    "address without workers": (
        ["cluster.workers=0", "cluster.address=tcp://host:8786"],
        "cluster.workers: 0 evaluates in this process, but cluster.address names a running cluster",
    ),
    "address without port": (
        ["cluster.address=host"],
        "cluster.address: 'host' does not have the form tcp://host:port",
    ),
    "transport": (["cluster.address=tcq://host:1"], "Dask has no transport 'tcq'; did you mean 'tcp'?"),
    # optimizers
    "foreign argument": (
        ["training.optimizer.name=Adam", "training.optimizer.arguments={beta: 1}"],
        "training.optimizer.arguments.beta: Adam has no argument 'beta'; did you mean 'betas'?",
    ),
    "refused argument": (
        ["training.optimizer.arguments.momentum=-1"],
        "training.optimizer.arguments: SGD refuses lr=0.1",
    ),
    "rate among the arguments": (["training.optimizer.arguments.lr=1"], "is set by training.optimizer.lr"),
    "optimizer with a closure": (["training.optimizer.name=LBFGS"], "LBFGS cannot be used here"),
    # malformed overrides
    "no equals sign": (["training.epochs"], "there is no '='; write --set training.epochs=VALUE"),
    "no key": (["=3"], "the key before '=' must be names joined by dots"),
    "empty part": (["training..epochs=3"], "the key before '=' must be names joined by dots"),
    "below a scalar": (["data.name.x=3"], "data.name is a single value and has no keys below it"),
    "list index": (["certification.radii.0=3"], "certification.radii is a list, which is set as a whole"),
    "value that is no YAML": (["data.name=[a"], "the value is refused: not valid YAML"),
}


@pytest.mark.parametrize(("overrides", "expected"), CASES.values(), ids=CASES.keys())
def test_a_mistake_is_answered_with_one_sentence(overrides: list[str], expected: str) -> None:
    text = message(*overrides)
    assert expected in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.flip=true", "data.crop_padding=1"],
        ["pruning.method=none", "baselines=[first-order]"],
        ["training.optimizer.lr=1e-3"],
        ["training.query_budget=1e6"],
        ["certification.n=10"],
        ["training.optimizer.name=Adam", "training.optimizer.arguments.betas=[0.8, 0.9]"],
        ["training.optimizer.name=RMSprop", "training.optimizer.lr=1e-2"],
        ["cluster.address=tls://[::1]:8786"],
        ["model.name=my.networks:make", "model.arguments.layers=[1, {a: null}]"],
        ["data.name=npz", "data.source=images.npz"],
        ["data.name=image_folder", "data.source=images"],
        ["data.source="],
        ["certification.radii=[]"],
    ],
    ids=" ".join,
)
def test_what_is_possible_is_accepted(overrides: list[str]) -> None:
    experiment = configs.load("demo", overrides)
    assert configs.loads(configs.dump(experiment)) == experiment


def test_several_mistakes_get_a_line_each() -> None:
    lines = message("training.epochs=0", "pruning.sparsity=2", "data.nam=x", name="demo").splitlines()
    assert len(lines) == 1  # the override that cannot be applied stops the reading
    lines = message("training.epochs=0", "pruning.sparsity=2").splitlines()
    assert [line.split(":")[0] for line in lines] == ["--set pruning.sparsity=2", "--set training.epochs=0"]
    lines = message("data.name=x", "model.name=y", "certification.n=1").splitlines()
    assert len(lines) == 3


def test_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("training:\n  epocs: 3\n", encoding="utf-8")
    assert message(name=str(file)) == f"{file}: training.epocs is not a known key; did you mean 'epochs'?"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the configuration is empty"),
        (b"- 1\n", "a configuration is a mapping of keys to values, not a list"),
        (b"a: [\n", "not valid YAML"),
        (b"seed: 1\nseed: 2\n", "the key 'seed' stands twice (line 2, column 1)"),
        (b"a: &x 1\nb: *x\n", "anchors and aliases are not supported"),
        (b"a: !!python/object:os.system 1\n", "the tag 'tag:yaml.org,2002:python/object:os.system' is not supported"),
        (b"1: 2\n", "the key 1 is not a name"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"seed: " + b"9" * 5000, "a number of 5000 digits is too long"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"---\nseed: 1\n---\nseed: 2\n", "not valid YAML"),
        (b"#" * (5 << 20), "is larger than 4 MiB"),
    ],
)
def test_an_unreadable_file_is_answered(content: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    text = message(name=str(file))
    assert expected in text
    assert str(file) in text
    assert "\n" not in text


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    assert "did you mean 'demo'?" in message(name="dmo")
    assert "there is no configuration file" in message(name="nowhere/demo.yaml")
    assert "is a folder" in message(name=str(tmp_path))
    for name in ("", "\0", "x" * 5000, "~nobody-of-that-name/x"):
        assert "\n" not in message(name=name)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("5.e-1", 0.5), (".5", 0.5), ("1_000", 1000.0), ("+2", 2.0), ("1e+2", 100.0)],
)
def test_numbers_are_what_they_are_in_python(text: str, value: float) -> None:
    assert configs.load("demo", [f"training.optimizer.lr={text}"]).training.optimizer.lr == value


def test_sgd_keeps_the_settings_that_are_not_overridden() -> None:
    optimizer = configs.load("demo", ["training.optimizer.arguments.momentum=0"]).training.optimizer
    assert optimizer.arguments == {"momentum": 0, "weight_decay": 5e-4}
    assert configs.load("demo", ["training.optimizer.name=Adam"]).training.optimizer.arguments == {}
