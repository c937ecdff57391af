"""JSON there and back: a batch into a template, and the scores out of what a server wrote.

Nothing that a server writes is trusted: it is text of somebody else's, parsed to numbers, lists and objects of JSON
alone, and quoted in messages only at its beginning and in ASCII.
"""

import json
from typing import Any, NoReturn

import orjson
from torch import Tensor

from deepzero_core.errors import RequestError, WorkError, suggest

BATCH = "$batch"
_SHOWN = 60


def check_template(template: Any) -> None:
    """Raise RequestError unless "$batch" stands exactly once in a JSON template, as a whole value."""
    try:
        json.dumps(template, allow_nan=False)
        orjson.dumps(template)  # which is stricter about keys and whole numbers
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the template of a request must be JSON: {error}") from None
    places = _places(template)
    if places != 1:
        raise RequestError(
            f'a template of a request holds "{BATCH}" once, where the batch belongs, as in '
            f'{{"instances": "{BATCH}"}}; this one holds it {places} times'
        )


def encode(template: Any, batch: Tensor) -> bytes:
    """The template with the batch [N, …] as nested lists in the place of "$batch".

    Raises:
        RequestError: numbers in the batch that are not finite, which JSON does not have.
    """
    if not bool(batch.isfinite().all()):
        bad = batch.numel() - int(batch.isfinite().sum())
        raise RequestError(f"{bad} of the {batch.numel()} numbers of the question are not finite; JSON has none such")
    # float64, whose shortest decimals are exact for every narrower float too.
    values = (batch.double() if batch.is_floating_point() else batch).numpy()
    # orjson, as the images of one question are half a million numbers.
    return orjson.dumps(_filled(template, values), option=orjson.OPT_SERIALIZE_NUMPY)


def decode(name: str, body: bytes) -> Any:
    """The JSON of an answer; every number a float.

    Raises:
        WorkError: not JSON: HTML, cut short, NaN or Infinity, nested without end.
    """
    try:
        # Whole numbers as floats: Python's own would be unbounded.
        return json.loads(body.decode("utf-8"), parse_int=float, parse_constant=_refuse)
    except _NotFiniteError as error:
        raise WorkError(f"the black box {name} answered {error}, which is no number: something in it broke") from None
    except RecursionError:
        raise WorkError(f"the black box {name} answered lists within lists without end") from None
    except ValueError as error:
        raise WorkError(f"the black box {name} answered {_described(body, error)}, not the JSON it should") from None


def pick(name: str, value: Any, path: str) -> Any:
    """What stands at a dotted path: keys of objects, numbers of list items, * for "of each".

    Raises:
        RequestError: there is no such place in what the server answered.
    """
    return _pick(name, value, [part for part in path.split(".") if part], path)


def shown(text: str, most: int = _SHOWN) -> str:
    """The beginning of a foreign text, safe to print on one line."""
    line = " ".join(text[: 4 * most].split())
    return ascii(line[:most]) + ("…" if len(line) > most else "")


def _pick(name: str, value: Any, parts: list[str], path: str) -> Any:
    for i, part in enumerate(parts):
        if part == "*" and isinstance(value, list):
            return [_pick(name, item, parts[i + 1 :], path) for item in value]
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isascii() and part.isdigit() and len(part) < 9 and int(part) < len(value):
            value = value[int(part)]
        else:
            if isinstance(value, dict):
                has = suggest(part, [ascii(key[:40])[1:-1] for key in list(value)[:10]])
            else:
                has = f"a list of {len(value)} is there" if isinstance(value, list) else f"{shown(str(value))} is there"
            raise RequestError(f"the answer of the black box {name} has no {part!r} of the path {path!r}: {has}")
    return value


def _places(template: Any) -> int:
    if isinstance(template, dict):
        return sum(map(_places, template.values()))
    if isinstance(template, list | tuple):
        return sum(map(_places, template))
    return int(template == BATCH)


def _filled(template: Any, batch: Any) -> Any:
    if isinstance(template, dict):
        return {key: _filled(value, batch) for key, value in template.items()}
    if isinstance(template, list | tuple):
        return [_filled(value, batch) for value in template]
    return batch if template == BATCH else template


class _NotFiniteError(Exception):
    pass


def _refuse(constant: str) -> NoReturn:
    raise _NotFiniteError(constant)


def _described(body: bytes, error: ValueError) -> str:
    text = body[:4096].decode("utf-8", "replace").strip()
    if not text:
        return "nothing"
    if text.startswith("<"):
        return f"a page of HTML or XML ({shown(text)})"
    if isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip()) - 1:
        return f"JSON that is cut short after {len(body)} bytes ({shown(text)})"
    return f"{shown(text)}"
