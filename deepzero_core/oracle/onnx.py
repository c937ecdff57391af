"""An ONNX file as a black box, computed by ONNX Runtime on the CPU."""

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepzero_core.callables import reason
from deepzero_core.errors import RequestError, WorkError, suggest
from deepzero_core.oracle.answers import as_tensor
from deepzero_core.oracle.protocol import Answers, answers_named, failed, question
from deepzero_core.oracle.settings import count

_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


class OnnxOracle:
    """A network in a file. Where its batch axis has a fixed length, a shorter question is filled up.

    Args:
        path: the file; weights kept beside it are found by ONNX Runtime.
        answers: "logits" or "probabilities".
        batch_size: the most examples of one query; None: any number, or as many as the file says.
        input, output: their names, needed only where the file has several inputs or where not the first output is
            the answer.
        name: what messages call it; by default the file's.

    Raises:
        RequestError: onnxruntime is not installed; no such file, not an ONNX model, no such input or output.
    """

    retries = 0
    concurrency = 1

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        answers: Answers = "logits",
        batch_size: int | None = None,
        input: str | None = None,
        output: str | None = None,
        name: str | None = None,
    ) -> None:
        self._path = Path(path).expanduser()
        self.name = name or self._path.name
        self.answers = answers_named(answers)
        if not self._path.is_file():
            raise RequestError(f"the black box {self.name} needs the ONNX file {self._path}, which is not there")
        self._session: Any = _session(self._path)
        chosen = _chosen(self.name, "input", self._session.get_inputs(), input, only=True)
        self._input: str = chosen.name
        self._output: str = _chosen(self.name, "output", self._session.get_outputs(), output, only=False).name
        if chosen.type not in _TYPES:
            raise RequestError(
                f"the black box {self.name} takes {chosen.type} at its input {chosen.name!r}; "
                f"images are given as one of {', '.join(_TYPES)}"
            )
        self._type = _TYPES[chosen.type]
        # A free axis has a name or None in the place of its length.
        axis = chosen.shape[0] if chosen.shape else None
        self._fixed: int | None = axis if isinstance(axis, int) else None
        limits = [limit for limit in (count("batch_size", batch_size), self._fixed) if limit is not None]
        self.batch_size = min(limits, default=None)
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        """A hash of the file, and of those beside it whose names begin with its name: they hold its weights."""
        if self._identity is None:
            digest = hashlib.blake2b(digest_size=32)
            for file in sorted(self._path.parent.iterdir()):
                if file.name.startswith(self._path.name) and file.is_file():
                    with file.open("rb") as stream:
                        digest.update(hashlib.file_digest(stream, "sha256").digest())
            self._identity = f"onnx:{digest.hexdigest()}:{self._input}:{self._output}"
        return self._identity

    def query(self, batch: Tensor) -> Tensor:
        """See `Oracle.query`."""
        x = question(self, batch).to(torch.float64 if self._type is np.float64 else torch.float32).numpy()
        if self._fixed is not None and len(x) < self._fixed:
            x = np.concatenate([x, np.repeat(x[-1:], self._fixed - len(x), axis=0)])
        if self._session is None:
            self._session = _session(self._path)
        try:
            (answer,) = self._session.run([self._output], {self._input: x.astype(self._type, copy=False)})
        except Exception as error:  # ONNX Runtime has many kinds of errors, none of which it documents
            kind = RequestError if type(error).__name__ == "InvalidArgument" else WorkError
            raise kind(failed(self.name, batch, error)) from error
        tensor = as_tensor(self.name, answer, len(batch))
        return tensor[: len(batch)] if tensor.ndim and len(tensor) == self._fixed else tensor

    def close(self) -> None:
        """Give the memory of the network back; the next query reads the file again."""
        self._session = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def __repr__(self) -> str:
        return f"OnnxOracle({self.name}, answers={self.answers!r}, batch_size={self.batch_size})"


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise RequestError(
            "a black box in an ONNX file needs onnxruntime, which is not installed: pip install 'deepzero[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised, and said once
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RequestError(f"{path} is not a model that ONNX Runtime can read: {reason(error)}") from error


def _chosen(name: str, what: str, nodes: list[Any], wanted: str | None, *, only: bool) -> Any:
    names = [node.name for node in nodes]
    if wanted is not None and wanted not in names:
        raise RequestError(f"the black box {name} has no {what} {wanted!r}; {suggest(wanted, names)}")
    if only and len(names) > 1:
        raise RequestError(f"the black box {name} has {len(names)} inputs ({', '.join(names)}); one is needed")
    return nodes[0] if wanted is None else nodes[names.index(wanted)]
