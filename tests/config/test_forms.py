"""The forms that Prefect makes of the flows' parameters: bounds, choices and descriptions are in the schema."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from configs.loading import SCHEMAS

BOUNDS_OF_PYDANTIC = {"ge", "le", "gt", "lt", "multiple_of"}


def parts(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        yield path, schema
        for key, value in schema.items():
            yield from parts(value, f"{path}/{key}")
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from parts(value, f"{path}/{index}")


@pytest.mark.parametrize("flow", SCHEMAS)
def test_bounds_are_those_of_json_schema(flow: str) -> None:
    """Behind a validator pydantic writes ge and le, which no form and no JSON schema knows."""
    schema = SCHEMAS[flow].model_json_schema()
    assert [path for path, part in parts(schema) if BOUNDS_OF_PYDANTIC & set(part)] == []
    counts = [part for _, part in parts(schema) if part.get("type") == "integer"]
    assert counts and all("minimum" in part and "maximum" in part for part in counts)


@pytest.mark.parametrize("flow", SCHEMAS)
def test_every_field_is_described(flow: str) -> None:
    def fields(model: type[BaseModel], seen: set[type]) -> Iterator[str]:
        seen.add(model)
        for name, field in model.model_fields.items():
            if not field.description:
                yield f"{model.__name__}.{name}"
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in seen:
                yield from fields(inner, seen)

    assert list(fields(SCHEMAS[flow], set())) == []
