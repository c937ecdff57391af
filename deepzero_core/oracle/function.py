"""A Python function as a black box."""

import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepzero_core.callables import resolve
from deepzero_core.errors import DeepZeroError, RequestError, WorkError, suggest
from deepzero_core.oracle.answers import as_tensor
from deepzero_core.oracle.protocol import Answers, answers_named, failed, question
from deepzero_core.oracle.settings import count

TAKES = ("numpy", "tensor")


class FunctionOracle:
    """Whatever a function returns for a batch.

    Args:
        function: [N, …] → [N, K], as an array, a tensor or lists of numbers; or its name "package.module:callable".
        answers: "logits" or "probabilities".
        takes: "numpy" or "tensor", what it is called with: a copy of its own.
        batch_size: the most examples of one query; None: any number.
        name: what messages call it; by default its own.
        version: tells a function from an earlier one of the same name to a cache, with the text of its file.

    Raises:
        RequestError: a function that cannot be imported.
    """

    retries = 0
    concurrency = 1

    def __init__(
        self,
        function: Callable[[Any], Any] | str,
        *,
        answers: Answers = "logits",
        takes: Literal["numpy", "tensor"] = "numpy",
        batch_size: int | None = None,
        name: str | None = None,
        version: str = "",
    ) -> None:
        self._function = resolve(function, what="black box") if isinstance(function, str) else function
        if not callable(self._function):
            raise RequestError(f"a black box of kind 'function' is a callable, not a {type(function).__name__}")
        if takes not in TAKES:
            raise RequestError(f"a function takes 'numpy' or 'tensor', not {takes!r}; {suggest(str(takes), TAKES)}")
        self.name = name or str(getattr(self._function, "__name__", type(self._function).__name__))
        self.answers = answers_named(answers)
        self.batch_size = count("batch_size", batch_size)
        self._takes, self._version = takes, version

    @property
    def identity(self) -> str:
        """Its full name, its version and a hash of the file that it stands in.

        Raises:
            RequestError: a lambda, a closure or an object without a version: another one would have the same name.
        """
        function = self._function
        where, qualified = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if not self._version and (not where or not qualified or "<" in qualified or inspect.ismethod(function)):
            raise RequestError(
                f"a cache cannot tell the black box {self.name} from others like it: give it a version, "
                "or make it a function of a module"
            )
        file = getattr(sys.modules.get(where or ""), "__file__", None)
        text = Path(file).read_bytes() if file and Path(file).is_file() else b""
        digest = hashlib.blake2b(text, digest_size=32).hexdigest()
        return f"function:{where}:{qualified or self.name}:{self._version}:{digest}"

    def query(self, batch: Tensor) -> Tensor:
        """See `Oracle.query`; whatever the function raises becomes a WorkError."""
        x = question(self, batch)
        x = x.float() if self._takes == "numpy" and x.dtype == torch.bfloat16 else x
        x = x.clone()
        try:
            with torch.no_grad():
                answer = self._function(x.numpy() if self._takes == "numpy" else x)
        except DeepZeroError:
            raise
        except Exception as error:
            raise WorkError(failed(self.name, batch, error)) from error
        return as_tensor(self.name, answer, len(batch))

    def close(self) -> None:
        """Nothing is held open."""

    def __repr__(self) -> str:
        return f"FunctionOracle({self.name}, answers={self.answers!r}, batch_size={self.batch_size})"
