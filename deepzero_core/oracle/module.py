"""A network as a black box: its values, and no way to its gradient."""

import copy
import hashlib

import torch
from torch import Tensor, nn

from deepzero_core.callables import reason, resolve
from deepzero_core.errors import RequestError, WorkError
from deepzero_core.oracle.answers import as_tensor
from deepzero_core.oracle.protocol import Answers, answers_named, failed, question
from deepzero_core.oracle.settings import count


class ModuleOracle:
    """A frozen copy of a torch module, in eval mode.

    The copy is taken at once: neither does the box change when the caller trains the module further, nor does the
    module get frozen behind the caller's back. The question is brought to the device and floating-point type of the
    module's parameters, the answer to the CPU in float32 or, where the module computes in it, float64.

    Args:
        module: [N, …] → [N, K], or "package.module:callable" of a function without arguments that returns it.
        answers: "logits" or "probabilities".
        batch_size: the most examples of one query; None: any number.
        name: what messages call it; by default its class.

    Raises:
        RequestError: a module that cannot be imported or copied.
    """

    retries = 0
    concurrency = 1

    def __init__(
        self,
        module: nn.Module | str,
        *,
        answers: Answers = "logits",
        batch_size: int | None = None,
        name: str | None = None,
    ) -> None:
        made = resolve(module, what="black box")() if isinstance(module, str) else module
        if not isinstance(made, nn.Module):
            raise RequestError(f"a black box of kind 'module' is a torch.nn.Module, not a {type(made).__name__}")
        self.name = name or type(made).__name__
        self.answers = answers_named(answers)
        self.batch_size = count("batch_size", batch_size)
        try:
            self._module = copy.deepcopy(made).requires_grad_(False).eval()
        except Exception as error:
            raise RequestError(f"the black box {self.name} cannot be copied: {reason(error)}") from error
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        """Its class, its structure as it prints itself, and a hash of every parameter and buffer."""
        if self._identity is None:
            digest = hashlib.blake2b(repr(self._module).encode(), digest_size=32)
            for key, value in sorted(
                {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}.items()
            ):
                digest.update(f"\0{key}\0{value.dtype}\0{list(value.shape)}\0".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            kind = type(self._module)
            self._identity = f"module:{kind.__module__}.{kind.__qualname__}:{digest.hexdigest()}"
        return self._identity

    def query(self, batch: Tensor) -> Tensor:
        """See `Oracle.query`."""
        x = question(self, batch)
        like = next((p for p in self._module.parameters() if p.is_floating_point()), None)
        # Its own copy: a module that works in place must not write into the caller's batch.
        x = x.clone() if like is None else x.to(like.device, like.dtype, copy=True)
        try:
            with torch.no_grad():
                answer = self._module(x)
        except Exception as error:
            raise WorkError(failed(self.name, batch, error)) from error
        # Detached once more there: a module may switch gradients on again for itself.
        return as_tensor(self.name, answer, len(batch))

    def close(self) -> None:
        """Nothing is held open."""

    def __repr__(self) -> str:
        return f"ModuleOracle({self.name}, answers={self.answers!r}, batch_size={self.batch_size})"
