"""What a black box is to the rest of the project: a question goes in, an answer comes out, and nothing else is known.

query: batch [N, C, H, W], or [N, …] → [N, K] logits or probabilities, on the CPU, float32 or float64
"""

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from deepzero_core.callables import reason
from deepzero_core.errors import BlackBoxError, RequestError, suggest

Answers = Literal["logits", "probabilities"]
ANSWERS: tuple[Answers, ...] = ("logits", "probabilities")


class BlackBoxUnavailableError(BlackBoxError):
    """The box did not answer for longer than anybody wanted to wait. What it answered before is in the cache."""


class QueryBudgetError(BlackBoxError):
    """The question costs more than what is left of the query budget. Nothing was sent."""


class Oracle(Protocol):
    """A black box: each example for itself, the same answer to the same question.

    Attributes:
        name: what messages call it.
        answers: what it answers, "logits" or "probabilities".
        batch_size: the most examples of one query; None: any number.
        identity: what it is, as text that no other box has: the same identity, the same answers. A box of which that
            cannot be said raises RequestError.
        retries: how often a query has been sent again so far; 0 for a box that is not at the end of a wire.
        concurrency: how many threads may ask it at the same time.
    """

    @property
    def name(self) -> str: ...
    @property
    def answers(self) -> Answers: ...
    @property
    def batch_size(self) -> int | None: ...
    @property
    def identity(self) -> str: ...
    @property
    def retries(self) -> int: ...
    @property
    def concurrency(self) -> int: ...

    def query(self, batch: Tensor) -> Tensor:
        """Answer a batch [N, …] of at least one example: [N, K], without a graph.

        Raises:
            RequestError: a question that the box cannot take, or an answer of another form than [N, K].
            BlackBoxUnavailableError: it does not answer.
            WorkError: it failed.
        """
        ...

    def close(self) -> None:
        """Let go of files and connections; the next query opens them again."""
        ...


def answers_named(name: str) -> Answers:
    """ "logits" or "probabilities". Raises RequestError for anything else."""
    for answers in ANSWERS:
        if name == answers:
            return answers
    raise RequestError(f"a black box answers 'logits' or 'probabilities', not {name!r}; {suggest(str(name), ANSWERS)}")


def question(oracle: Oracle, batch: Tensor) -> Tensor:
    """The batch as a box sees it: on the CPU, contiguous, without a graph; the caller's own is left alone.

    Raises:
        RequestError: no batch, more examples than the box takes at once, or a transform of torch.func around the
            query: it would take the answer for a constant.
    """
    name, limit = oracle.name, oracle.batch_size
    if not isinstance(batch, Tensor) or batch.ndim < 2 or not len(batch):
        got = f"shape {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise RequestError(f"the black box {name} takes a batch [N, …] of at least one example, not {got}")
    if torch._C._functorch.is_functorch_wrapped_tensor(batch) or unpack_dual(batch).tangent is not None:
        raise RequestError(
            f"the black box {name} cannot be queried within a transform of torch.func; use as_layer(oracle)"
        )
    if limit is not None and len(batch) > limit:
        raise RequestError(f"the black box {name} takes at most {limit} examples at once, not {len(batch)}")
    return batch.detach().cpu().contiguous()


def failed(name: str, batch: Tensor, error: Exception) -> str:
    """The sentence for a box in this process that has raised something over a question."""
    return f"the black box {name} failed on a question of shape {list(batch.shape)}: {reason(error)}"
