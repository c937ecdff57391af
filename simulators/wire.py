"""What deepzero and a program say to each other through pipes: lines of text and raw numbers, easy in any language.

    question   step K\\n                                  K arrays follow
               NAME TYPE AXES SIZE SIZE …\\n              e.g. "velocity float64 2 16 64"
               raw numbers, little-endian, the last axis fastest
    answer     done K\\n and K arrays in the same way, or error MESSAGE\\n

The first axis of every array is N, the simulations. A program answers until its input ends, and then leaves.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

TYPES = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8")}
LONGEST_LINE = 4096


class MalformedAnswerError(Exception):
    """The program answered something else than the format allows."""


class Reader(Protocol):
    def line(self) -> str:
        """The next line, without its end."""
        ...

    def bytes(self, count: int) -> bytes:
        """Exactly as many bytes."""
        ...


def question(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes that ask for a step."""
    parts = [f"step {len(arrays)}\n".encode()]
    for name, array in arrays.items():
        kind = next(name for name, kind in TYPES.items() if kind.itemsize == array.dtype.itemsize)
        sizes = " ".join(map(str, array.shape))
        parts += [f"{name} {kind} {array.ndim} {sizes}\n".encode(), array.astype(TYPES[kind]).tobytes()]
    return b"".join(parts)


def answer(reader: Reader, expected: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays of an answer, which must be those of `expected`, name to shape, in any order.

    Raises:
        MalformedAnswerError: says what came instead.
    """
    word, _, rest = reader.line().partition(" ")
    if word == "error":
        raise MalformedAnswerError(f"it says: {rest[:200]}")
    if word != "done" or rest != str(len(expected)):
        raise MalformedAnswerError(f'it answered "{f"{word} {rest}"[:80]}" in place of "done {len(expected)}"')
    found: dict[str, np.ndarray] = {}
    for _ in expected:
        header = reader.line()
        name, kind, shape = _parsed(header)
        if kind not in TYPES or expected.get(name) != shape or name in found:
            wanted = "; ".join(f"{name} {' '.join(map(str, shape))}" for name, shape in expected.items())
            raise MalformedAnswerError(
                f'it answered an array "{header[:80]}"; expected, with a type before them: {wanted}'
            )
        size = math.prod(shape) * TYPES[kind].itemsize
        found[name] = np.frombuffer(reader.bytes(size), TYPES[kind]).reshape(shape)
    return found


def _parsed(header: str) -> tuple[str, str, tuple[int, ...]]:
    parts = header.split(" ")
    if len(parts) < 3 or not all(part.isdigit() for part in parts[2:]) or int(parts[2]) != len(parts) - 3:
        raise MalformedAnswerError(f'it answered "{header[:80]}" in place of "NAME TYPE AXES SIZE SIZE …"')
    return parts[0], parts[1], tuple(map(int, parts[3:]))
