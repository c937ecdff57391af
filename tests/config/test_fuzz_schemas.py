"""Every schema, not that of an experiment alone: whatever a configuration says, it is valid or refused in sentences."""

import typing
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import configs
from configs import yaml_text
from configs.loading import SCHEMAS
from deepzero_core.errors import RequestError

FLOWS = sorted(SCHEMAS)

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
NAMES = "cge rge sol sol-zo src none zo-ds fo-ds deepzero trained http onnx wake burgers external digits cnn dncnn Adam"
VALUES = ["", "null", "true", "0", "1", "-1", "1e-3", ".nan", ".inf", "1e400", "[]", "{}", "[1, 2]", "[0, 0]", "{a: 1}"]
values = st.sampled_from([*VALUES, *NAMES.split(), "[none]", "{url: 'http://a'}", "x:y", "[8, 8]"]) | st.text(
    max_size=20
)


def keys_of(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted name of every key, sections included."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind, f"{prefix}{name}.")


def accepts(flow: str, text: str, overrides: tuple[str, ...] = ()) -> None:
    try:
        experiment = configs.loads(text, overrides, flow=flow)
    except RequestError as error:
        assert str(error).strip()
        assert len(str(error)) < 20_000
        return
    assert configs.loads(configs.dump(experiment), flow=flow) == experiment


@pytest.mark.parametrize("flow", FLOWS)
def test_every_key_of_the_schema_is_found(flow: str) -> None:
    keys = set(keys_of(SCHEMAS[flow]))
    assert {"name", "cluster", "cluster.workers", "training.optimizer.lr"} & keys or len(keys) > 3
    assert len(keys) == len(list(keys_of(SCHEMAS[flow])))


@pytest.mark.parametrize("flow", FLOWS)
@settings(max_examples=60)
@given(data=st.data())
def test_any_overrides_of_a_preset(flow: str, data: st.DataObject) -> None:
    keys = sorted(keys_of(SCHEMAS[flow]))
    preset = data.draw(st.sampled_from(configs.presets(flow)))
    one = st.builds("{}={}".format, st.sampled_from(keys), values) | st.text(max_size=30)
    overrides = data.draw(st.lists(one, min_size=1, max_size=3))
    try:
        experiment = configs.load(preset, overrides, flow=flow)
    except RequestError as error:
        assert str(error).strip()
        return
    assert configs.loads(configs.dump(experiment), flow=flow) == experiment


@pytest.mark.parametrize("flow", FLOWS)
@settings(max_examples=60)
@given(data=st.data())
def test_any_data_below_known_keys(flow: str, data: st.DataObject) -> None:
    document: dict[str, Any] = {}
    keys = sorted(keys_of(SCHEMAS[flow]))
    for key in data.draw(st.lists(st.sampled_from(keys), max_size=4, unique=True)):
        place = document
        *sections, last = key.split(".")
        for section in sections:
            inner = place.setdefault(section, {})
            if not isinstance(inner, dict):
                break
            place = inner
        else:
            place[last] = data.draw(plain)
    accepts(flow, yaml_text.write(document))


@pytest.mark.parametrize("flow", FLOWS)
@given(text=st.text(max_size=200))
def test_any_text(flow: str, text: str) -> None:
    accepts(flow, text)
