"""Around any black box: its questions cut, counted, paced and paid for, its answers checked and kept."""

import threading
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepzero_core.errors import RequestError
from deepzero_core.oracle.account import Account, MemoryAccount, Usage, refuse_over
from deepzero_core.oracle.answers import check, look_like_probabilities
from deepzero_core.oracle.cache import ResponseCache, keys_of
from deepzero_core.oracle.protocol import Answers, BlackBoxUnavailableError, Oracle, question
from deepzero_core.oracle.rate import Pace
from deepzero_core.oracle.settings import count, positive
from deepzero_core.oracle.together import in_order

# Rows that must look like probabilities before a box said to answer logits is doubted: a single one may by chance.
_DOUBTFUL_ROWS = 4


@dataclass(frozen=True)
class Statistics(Usage):
    """`Usage` and what it cost: `cost` in the currency of the price, None where there is none."""

    cost: float | None = None


class Metered:
    """An oracle that takes any number of examples, and no more of them than the budget allows.

    A question is cut into calls of at most `batch_size` examples. With a cache, what it knows is not asked and costs
    nothing, and an example that stands twice in a question is asked once. What a call answers is in the cache before
    the next one is made, so that a run that ends there has lost nothing. Threads take turns; several processes with one
    cache may ask the same thing at the same moment, and then pay twice.

    A box that takes several calls at the same time (`Oracle.concurrency`) gets them: the same calls, the answers in the
    order of the question, each on the account before it is sent and in the cache as soon as it is there. When one
    fails, no other is begun, and those under way are waited for, paid for and kept.

    The budget counts examples. A question that would exceed it is refused before anything is sent. Examples of a call
    that the box never answered (`BlackBoxUnavailableError`) are given back; what else was sent stays counted, a wrong
    answer too.

    Args:
        oracle: the box itself.
        budget: the most examples; None: no limit.
        batch_size: the most examples of one call, where that should be fewer than the box takes.
        classes: K, where it is known; else that of the first answer.
        examples_per_second, calls_per_second: how fast the box may be asked, by all who share the account; see `Pace`.
            A call sent again after a fault waits by its own rules.
        price_per_thousand: the price of 1,000 examples, for `statistics.cost`.
        cache: answers paid for earlier.
        account: where the counts are kept; by default in memory, from zero.

    Raises:
        RequestError: a limit that is not above zero; a cache around a box without an identity.
    """

    batch_size: None = None
    concurrency = 1  # threads take turns

    def __init__(
        self,
        oracle: Oracle,
        *,
        budget: int | None = None,
        batch_size: int | None = None,
        classes: int | None = None,
        examples_per_second: float | None = None,
        calls_per_second: float | None = None,
        price_per_thousand: float | None = None,
        cache: ResponseCache | None = None,
        account: Account | None = None,
    ) -> None:
        self.oracle = oracle
        self.budget = count("budget", budget)
        self.classes = count("classes", classes, least=2)
        limits = [limit for limit in (count("batch_size", batch_size), oracle.batch_size) if limit is not None]
        self._most: int | None = min(limits, default=None)
        self._own_account = account is None
        self._account: Account = account or MemoryAccount()
        self._by_example = self._pace("examples_per_second", examples_per_second)
        self._by_call = self._pace("calls_per_second", calls_per_second)
        self._price = None if price_per_thousand is None else positive("price_per_thousand", price_per_thousand)
        self._cache = cache
        self._identity = oracle.identity if cache is not None else None
        self._doubted = False
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        # What the calls under way share: how often the box had sent again, the number of classes, the doubt.
        self._shared = threading.Lock()
        self._retried = self.oracle.retries

    def _pace(self, name: str, per_second: float | None) -> Pace | None:
        return None if per_second is None else Pace(name, per_second, self._account)

    @property
    def name(self) -> str:
        """The box's."""
        return self.oracle.name

    @property
    def answers(self) -> Answers:
        """The box's."""
        return self.oracle.answers

    @property
    def identity(self) -> str:
        """The box's."""
        return self.oracle.identity

    @property
    def retries(self) -> int:
        """The box's."""
        return self.oracle.retries

    @property
    def statistics(self) -> Statistics:
        """What has been asked so far, on this account, and what it cost."""
        usage = self._account.usage
        cost = None if self._price is None else usage.examples * self._price / 1000
        return Statistics(**vars(usage), cost=cost)

    @property
    def budget_left(self) -> int | None:
        """Examples that may still be asked; None: any number."""
        return None if self.budget is None else self.budget - self._account.usage.examples

    def query(self, batch: Tensor) -> Tensor:
        """See `Oracle.query`; any number of examples N ≥ 1.

        Raises:
            QueryBudgetError: more examples have to be asked than are left; nothing was sent. (Where processes share an
                account, another may spend the rest while a question is being asked: what was answered is in the cache.)
            RequestError, WorkError: as the box, and for an answer that is none (`deepzero_core.oracle.answers`).
        """
        batch = question(self, batch)
        with self._lock:
            self._retried = self.oracle.retries
            if self._cache is not None and self._identity is not None:
                return self._ask_what_is_new(batch, self._identity, self._cache)
            self._afford(len(batch))
            pieces = batch.split(self._most or len(batch))
            return torch.cat(in_order(self._call, pieces, self.oracle.concurrency))

    def close(self) -> None:
        """Close the box, the cache and the account; the next query opens them again."""
        for part in (self.oracle, self._cache, self._account):
            if part is not None:
                part.close()

    def __enter__(self) -> "Metered":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        if self.budget is not None and self._own_account:
            raise RequestError(
                f"the budget of the black box {self.name} is counted in this process; to share it with others give it "
                "a StoredAccount"
            )
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_shared")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __repr__(self) -> str:
        return f"Metered({self.oracle!r}, budget={self.budget}, cached={self._cache is not None})"

    def _ask_what_is_new(self, batch: Tensor, identity: str, cache: ResponseCache) -> Tensor:
        keys = keys_of(identity, batch)
        rows = cache.get(keys)
        # The first of equal examples stands for all of them.
        unknown = {key: i for i, key in reversed(list(enumerate(keys))) if key not in rows}
        asked = sorted(unknown.values())
        self._afford(len(asked))
        if len(asked) < len(batch):
            self._account.add(Usage(cached=len(batch) - len(asked)))

        def kept(some: list[int]) -> dict[bytes, Tensor]:
            answered = dict(zip((keys[i] for i in some), self._call(batch[some]), strict=True))
            cache.put(answered)
            return answered

        most = self._most or len(batch)
        pieces = [asked[start : start + most] for start in range(0, len(asked), most)]
        for answered in in_order(kept, pieces, self.oracle.concurrency):
            rows |= answered
        answer = torch.stack([rows[key] for key in keys])
        return check(self.name, self.answers, answer, examples=len(batch), classes=self.classes)

    def _afford(self, examples: int) -> None:
        refuse_over(self.budget, self._account.usage.examples, examples)

    def _call(self, piece: Tensor) -> Tensor:
        """One call of the box: [N, …] → [N, K], counted before it is sent."""
        for pace, units in ((self._by_example, len(piece)), (self._by_call, 1)):
            if pace is not None:
                pace.wait(units)
        self._account.add(Usage(examples=len(piece), calls=1), budget=self.budget)
        started, refund = time.monotonic(), Usage()
        try:
            answer = self.oracle.query(piece)
        except BlackBoxUnavailableError:
            refund = Usage(examples=-len(piece), calls=-1)
            raise
        finally:
            with self._shared:
                before, self._retried = self._retried, self.oracle.retries
                sent_again = self._retried - before
            self._account.add(Usage(retries=sent_again, seconds=time.monotonic() - started) + refund)
        with self._shared:
            return self._judged(answer, len(piece))

    def _judged(self, answer: Tensor, examples: int) -> Tensor:
        """The answer to so many examples, if it is one."""
        answer = check(self.name, self.answers, answer, examples=examples, classes=self.classes)
        if self.answers == "logits" and not self._doubted and len(answer) >= _DOUBTFUL_ROWS:
            self._doubted = True
            if look_like_probabilities(answer):
                warnings.warn(
                    f"the black box {self.name} is said to answer logits, and its answers look like probabilities; "
                    "if they are, say so with answers='probabilities'",
                    stacklevel=4,
                )
        self.classes = answer.shape[1]
        return answer
