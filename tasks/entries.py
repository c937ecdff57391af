"""What an entry of a spool has to look like before MLflow is told it; see `tasks.delivery` for what they mean.

A spool is a file that anybody could have written. MLflow reports a value of a wrong type, once it is at its database,
as an error of its own that may pass, and an entry that can never be told would hold up all behind it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, ValidationError

Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
Time = Annotated[int, Field(ge=0, lt=2**53)]
"""Milliseconds since 1970."""
Texts = dict[Text, Text]


class Entry(BaseModel, strict=True):
    """By its kind."""


class Create(Entry):
    experiment_id: Text
    name: Text
    tags: Texts
    time: Time


class Values(Entry):
    values: Texts


class Reopen(Entry):
    tags: Texts


class File(Entry):
    name: Text
    folder: Text | None


class DatasetRead(Entry):
    name: Text
    digest: Text
    facts: dict[Text, Any]


class End(Entry):
    status: Literal["FINISHED", "FAILED", "KILLED"]
    time: Time


_SHAPES = {
    "create": Create,
    "params": Values,
    "tags": Values,
    "reopen": Reopen,
    "file": File,
    "dataset": DatasetRead,
    "end": End,
}


def fault(entry: dict[str, Any]) -> str | None:
    """What is wrong with an entry of a kind above, if anything is."""
    try:
        _SHAPES[entry["kind"]].model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return None
