"""The manifest parser: what it accepts, what it refuses, and that it never fails in another way."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepzero_core.data.manifest import Manifest, digest_of
from deepzero_core.errors import RequestError

MANIFEST = Manifest(
    schema_version=1,
    name="toy",
    source="drawn by hand",
    licence="MIT",
    class_names=("cat", "dog"),
    image_shape=(3, 4, 5),
    counts={"train": 7, "test": 2},
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 1.0),
    files={"train.arrow": "a" * 64, "test.arrow": "b" * 64},
    sizes={"train.arrow": 1234, "test.arrow": 567},
)


def parse(data: bytes) -> Manifest:
    return Manifest.parse(data, where="/store/manifest.json", remedy="mend it")


def payload() -> dict:
    return json.loads(MANIFEST.to_json())


def signed(content: dict) -> bytes:
    """JSON whose digest fits, so that the parser gets as far as the fields."""
    body = {key: value for key, value in content.items() if key != "digest"}
    return json.dumps({**body, "digest": digest_of(body)}).encode()


def test_round_trip():
    parsed = parse(MANIFEST.to_json().encode())
    assert parsed == MANIFEST
    assert parsed.digest == MANIFEST.digest
    assert parsed.num_classes == 2


def test_digest_covers_every_field():
    changed = {
        "schema_version": 2,
        "name": "other",
        "source": "elsewhere",
        "licence": "none",
        "class_names": ("dog", "cat"),
        "image_shape": (3, 5, 4),
        "counts": {"train": 8, "test": 2},
        "mean": (0.1, 0.2, 0.4),
        "std": (0.4, 0.5, 0.9),
        "files": {"train.arrow": "c" * 64, "test.arrow": "b" * 64},
        "sizes": {"train.arrow": 1235, "test.arrow": 567},
    }
    assert set(changed) == set(payload()) - {"digest"}
    digests = {replace(MANIFEST, **{key: value}).digest for key, value in changed.items()}
    assert len(digests | {MANIFEST.digest}) == len(changed) + 1


BROKEN = {
    "version": ({"schema_version": 2}, "schema version 2, this deepzero reads version 1"),
    "version-type": ({"schema_version": "1"}, "'schema_version' is missing or not a number"),
    "version-bool": ({"schema_version": True}, "'schema_version' is missing or not a number"),
    "unknown-key": ({"clas_names": []}, "unknown key 'clas_names', did you mean 'class_names'?"),
    "name": ({"name": ""}, "'name' has to be a non-empty string"),
    "classes-empty": ({"class_names": []}, "'class_names' has to be a non-empty list"),
    "classes-twice": ({"class_names": ["cat", "cat"]}, "holds a name twice"),
    "shape-short": ({"image_shape": [4, 5]}, "'image_shape' has to be [channels, height, width]"),
    "shape-zero": ({"image_shape": [3, 0, 5]}, "'image_shape' has to be"),
    "shape-huge": ({"image_shape": [3, 10**30, 5]}, "'image_shape' has to be"),
    "counts": ({"counts": {"train": 7}}, "'counts' has to give a positive number of examples for each of train, test"),
    "counts-zero": ({"counts": {"train": 7, "test": 0}}, "'counts' has to give"),
    "mean-range": ({"mean": [0.1, 0.2, 125.3]}, "'mean' has to be a non-empty list of numbers in [0, 1]"),
    "mean-huge": ({"mean": [0.1, 0.2, 10**400]}, "'mean' has to be"),
    "mean-channels": ({"mean": [0.1]}, "one number for each of the 3 channels"),
    "std-zero": ({"std": [0.4, 0.5, 0.0]}, "'std' has to be a non-empty list of numbers in (0, 1]"),
    "traversal": ({"files": {"../../passwd": "a" * 64, "test.arrow": "b" * 64}}, "'files' has to give a sha256"),
    "hash": ({"files": {"train.arrow": "xyz", "test.arrow": "b" * 64}}, "'files' has to give a sha256"),
    "size": ({"sizes": {"train.arrow": -1, "test.arrow": 5}}, "'sizes' has to give a positive number of bytes"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_field_is_named(change, message):
    with pytest.raises(RequestError) as caught:
        parse(signed({**payload(), **change}))
    assert message in str(caught.value)
    assert str(caught.value).startswith("manifest /store/manifest.json cannot be used: ")
    assert str(caught.value).endswith("; mend it")


@pytest.mark.parametrize("key", sorted(json.loads(MANIFEST.to_json())))
def test_missing_field_is_named(key):
    content = payload()
    del content[key]
    with pytest.raises(RequestError, match=f"'{key}' is missing"):
        parse(json.dumps(content).encode())


def test_changed_value_does_not_fit_the_digest():
    text = MANIFEST.to_json().replace("0.2", "0.25")
    assert text != MANIFEST.to_json()
    with pytest.raises(RequestError, match="changed or damaged"):
        parse(text.encode())


GARBAGE = {
    "empty": b"",
    "text": b"hello",
    "truncated": MANIFEST.to_json().encode()[:200],
    "not-utf8": b'{"name": "\xff\xfe"}',
    "zeros": bytes(64),
    "list": b"[]",
    "nan": b'{"schema_version": NaN}',
    "deep": b"[" * 100_000,
    "digits": b'{"schema_version": ' + b"9" * 10_000 + b"}",
    "duplicate": b'{"name": "a", "name": "b"}',
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_refused(data):
    with pytest.raises(RequestError, match=r"manifest /store/manifest\.json cannot be used: .*; mend it"):
        parse(data)


def refused_or_valid(data: bytes) -> None:
    try:
        manifest = parse(data)
    except RequestError as error:
        assert "\n" not in str(error)
        return
    assert parse(manifest.to_json().encode()) == manifest


@given(st.binary(max_size=400))
def test_random_bytes(data):
    refused_or_valid(data)


@given(st.data())
def test_bytes_flipped_inserted_and_cut(data):
    text = bytearray(MANIFEST.to_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(start + 20, len(text))))
        text[start:stop] = data.draw(st.binary(max_size=8))
    refused_or_valid(bytes(text))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**63, 10**400, 0.5, 1e308, -0.0])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value, path=()):
    """The path of every value inside a JSON document."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@given(st.data())
def test_mutated_json(data):
    content = payload()
    for _ in range(data.draw(st.integers(1, 3))):
        # Deletions may leave the document without any place but its root.
        path = data.draw(st.sampled_from([path for path in places(content) if path] or [("name",)]))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()) or not isinstance(parent, dict):
            parent[path[-1]] = data.draw(JSON)
        else:
            parent.pop(path[-1], None)
            parent[data.draw(st.text(max_size=8))] = data.draw(JSON)
    refused_or_valid(signed(content) if data.draw(st.booleans()) else json.dumps(content).encode())
