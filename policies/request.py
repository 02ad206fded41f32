"""A request as the scheduler sees it: what it asked for, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policies.decode_pool import DecodePool

NOT_YET = float("nan")


class Request:
    """One request inside a replica. Mutable, and changed by the scheduler only.

    A request first *prefills*: the KV cache of its ``prefill_tokens`` tokens is computed in chunks.
    ``scheduled_tokens`` counts what was handed to a batch, ``completed_tokens`` what has left the last
    stage; with a pipeline the two differ. The last chunk yields the first output token. From then on
    the request *decodes* in a :class:`~policies.decode_pool.DecodePool`, one token a batch.

    A preempted request loses its KV cache and prefills again, its output so far included, so
    ``prefill_tokens`` is ``prompt_tokens`` plus what had been generated.

    Times are seconds on the driver's clock; NaN means "not yet".
    """

    __slots__ = (
        "_generated",
        "arrival_s",
        "completed_tokens",
        "deadline_s",
        "first_token_s",
        "held_prefix",
        "home",
        "id",
        "kv_blocks",
        "last_token_s",
        "output_tokens",
        "pool",
        "pool_entry_step",
        "preemptions",
        "prefill_tokens",
        "prefix_ids",
        "prompt_tokens",
        "scheduled_s",
        "scheduled_tokens",
        "shards",
        "slo_class",
        "stored_prefix",
        "work_s",
    )

    def __init__(
        self,
        id: int,
        arrival_s: float,
        prompt_tokens: int,
        output_tokens: int,
        slo_class: int = 0,
        *,
        work_s: float = 0.0,
        deadline_s: float = 0.0,
        prefix_ids: Sequence[int] = (),
    ) -> None:
        self.id = id
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.slo_class = slo_class
        self.work_s = work_s  # C[prompt]: predicted time of its prefill alone
        self.deadline_s = deadline_s  # D: seconds after arrival by which the first token is due
        self.prefill_tokens = prompt_tokens
        self.scheduled_tokens = 0
        self.completed_tokens = 0
        self.scheduled_s = NOT_YET
        self.first_token_s = NOT_YET
        self.last_token_s = NOT_YET  # settled while outside a decode pool; inside, the pool knows
        self.preemptions = 0
        self.kv_blocks = 0  # blocks it holds, as of its entry into the decode pool
        self.home = 0  # KVP group of its first tokens
        self.shards = 1  # KVP groups that it will have taken when it is finished
        self.prefix_ids = prefix_ids  # of the prefix blocks that its prompt fills, in prompt order
        self.held_prefix: list[int] = []  # of them, those whose blocks it counts as its own
        self.stored_prefix = 0  # how many of them others may find
        self.pool: DecodePool | None = None
        self.pool_entry_step = 0
        self._generated = 0

    @property
    def generated_tokens(self) -> int:
        """Output tokens produced so far."""
        if self.pool is None:
            return self._generated
        return self._generated + self.pool.steps - self.pool_entry_step

    @generated_tokens.setter
    def generated_tokens(self, value: int) -> None:
        self._generated = value

    @property
    def remaining_prefill_tokens(self) -> int:
        """Tokens of its prefill that no batch has taken yet."""
        return self.prefill_tokens - self.scheduled_tokens

    @property
    def kv_tokens(self) -> int:
        """Tokens in its KV cache: the prefill, and every generated token that was fed back."""
        if self.completed_tokens < self.prefill_tokens:
            return self.completed_tokens
        return self.prompt_tokens + self.generated_tokens - 1

    def __repr__(self) -> str:
        return (
            f"Request(id={self.id}, arrival_s={self.arrival_s:.6g}, "
            f"prefill={self.scheduled_tokens}/{self.prefill_tokens}, "
            f"output={self.generated_tokens}/{self.output_tokens})"
        )
