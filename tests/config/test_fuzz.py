"""Whatever is written into a configuration: a valid experiment or a RequestError, never anything else."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import configs
from configs import optimizers, yaml_text
from configs.schema import METHODS, Experiment
from deepzero_core.errors import RequestError

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-12, max_value=1e12)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | finite | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@given(plain)
@example(
    {
        "a": "1e-3",
        "b": "no",
        "c": "010",
        "d": "1:30",
        "e": "null",
        "f": "",
        "g": "2020-01-01",
        "h": "~",
        "i": "=",
        "j": "<<",
    }
)
@example(
    ["1_0", "0x1F", ".5", "1.", "1.e5", "true", "Yes", "+.inf", ".nan", "\x85\u2028\ufeff", "\x00\x07", "a: b # c"]
)
def test_what_is_written_is_read_again(data: Any) -> None:
    assert yaml_text.parse(yaml_text.write(data)) == data


@st.composite
def experiments(draw: st.DrawFn) -> Experiment:
    training = draw(st.sampled_from(METHODS))
    return Experiment.model_validate(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True)),
            "seed": draw(st.integers(0, 2**63 - 1)),
            "data": {
                "name": "image_folder",
                "source": draw(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)),
                "image_size": draw(st.integers(64, 256)),
                "batch_size": draw(st.integers(1, 512)),
                "flip": draw(st.booleans()),
            },
            "model": {
                "name": "my.nets:make",
                "arguments": draw(st.dictionaries(st.text(max_size=8), plain, max_size=4)),
            },
            "pruning": {"sparsity": draw(st.floats(0, 1, exclude_max=True)), "mu": draw(positive)},
            "estimator": {"mu": draw(positive), "difference": draw(st.sampled_from(["forward", "central"]))},
            "training": {
                "method": training,
                "optimizer": {"lr": draw(positive)},
                "query_budget": draw(st.none() | st.just(10**9)),
            },
            "baselines": draw(st.lists(st.sampled_from([m for m in METHODS if m != training]), unique=True)),
            "certification": {
                "sigma": draw(positive),
                "alpha": draw(st.floats(0.0001, 0.9999)),
                "radii": draw(st.lists(st.floats(0, 1e6), unique=True, max_size=5)),
            },
            "cluster": {"timeout_s": draw(positive), "workers": draw(st.integers(0, 64))},
        }
    )


@given(experiments())
def test_loading_what_was_dumped_is_the_identity(experiment: Experiment) -> None:
    assert configs.loads(configs.dump(experiment)) == experiment
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


def accepts(text: str, overrides: tuple[str, ...] = ()) -> None:
    try:
        experiment = configs.loads(text, overrides)
    except RequestError as error:
        assert str(error).strip()
        return
    assert configs.loads(configs.dump(experiment)) == experiment


KEYS = [
    f"{section}.{key}" if section else key
    for section, keys in {
        "": Experiment.model_fields,
        **{
            name: getattr(Experiment(), name).__class__.model_fields
            for name in ("data", "model", "pruning", "estimator")
        },
        **{
            name: getattr(Experiment(), name).__class__.model_fields
            for name in ("training", "certification", "cluster")
        },
        "training.optimizer": Experiment().training.optimizer.__class__.model_fields,
        "training.schedule": Experiment().training.schedule.__class__.model_fields,
    }.items()
    for key in keys
]
values = st.sampled_from(
    [
        "",
        "null",
        "true",
        "0",
        "1",
        "-1",
        "1e-3",
        ".nan",
        ".inf",
        "1e400",
        "[]",
        "{}",
        "[1, 2]",
        "{a: 1}",
        "none",
        "Adam",
        "x:y",
    ]
) | st.text(max_size=20)


@given(st.text(max_size=200))
@example("data: {name: cnn\x00}")
@example("training: {optimizer: {arguments: {momentum: [1, {a: .inf}]}}}")
@example("!!binary x: 1")
@example("? [a]\n: 1")
def test_any_text(text: str) -> None:
    accepts(text)


@given(plain)
def test_any_data(data: Any) -> None:
    accepts(yaml_text.write(data))


@given(st.dictionaries(st.sampled_from(sorted({key.partition(".")[0] for key in KEYS})), plain, max_size=4))
def test_any_data_below_known_keys(data: Any) -> None:
    accepts(yaml_text.write(data))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
@example(content="seed: 1\n".encode("utf-16"))
@example(content=b"\xef\xbb\xbfseed: 1\n")
def test_any_bytes(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "any.yaml"
    file.write_bytes(content)
    with contextlib.suppress(RequestError):
        configs.load(str(file))


@settings(max_examples=200)
@given(
    st.lists(st.builds("{}={}".format, st.sampled_from(KEYS), values) | st.text(max_size=30), min_size=1, max_size=3)
)
@example(["training.optimizer.arguments.a.b.c=1"])
@example(["training.optimizer.arguments=[1]", "training.optimizer.arguments.a=1"])
def test_any_overrides(overrides: list[str]) -> None:
    accepts("name: fuzz", tuple(overrides))


@given(st.text(max_size=50))
@example("a\nb\\")
def test_any_preset_name(name: str) -> None:
    assume(not Path(name.replace("\0", "x")[:50]).is_file())
    try:
        assert configs.load(name).name in configs.presets()
    except RequestError as error:
        assert "\n" not in str(error)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "momentum": finite | st.integers(-2, 2) | st.booleans() | st.text(max_size=2),
            "weight_decay": finite | st.integers(-2, 2),
            "nesterov": st.booleans() | st.none(),
        },
    )
)
def test_the_short_way_for_sgd_lets_nothing_pass_that_torch_refuses(arguments: dict[str, Any]) -> None:
    import torch

    if not optimizers._plain_sgd("SGD", 0.1, arguments):
        return
    assert all(math.isfinite(value) for value in arguments.values())
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1, **arguments).step()


@pytest.mark.parametrize(
    "name", ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Rprop"]
)
def test_the_optimizers_of_torch_are_accepted_by_name(name: str) -> None:
    assert optimizers.problems(name, 0.01, {}) == []
