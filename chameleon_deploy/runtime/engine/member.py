"""A row on its way through the engine, and its prompt."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.runtime.decode.prompt_lookup import PromptLookup
from chameleon_deploy.runtime.engine.factor_table import NO_UPDATE
from chameleon_deploy.runtime.engine.stream import Stream
from chameleon_deploy.runtime.engine.tenants import NOBODY, Tenant
from chameleon_deploy.runtime.factor_sources import FactorSource
from chameleon_deploy.runtime.generation import Generate, Row


@dataclass(eq=False)
class Prompt:
    """The prompt of one or more members.

    ids      token ids
    start    the token from which on the factors update it, see RowFactors; set with the source of the factors
    logits   float32 [vocab] after the last token, set by the prefill
    readers  number of members in the batch that have read it
    exact    how many tokens at the beginning have the keys and values of every run, see prefix_cache.py
    begun    whether it was looked for in the prefix cache
    """

    ids: Sequence[int]
    start: int = field(init=False)
    logits: FloatArray | None = None
    readers: int = 0
    exact: int = 0
    begun: bool = False


@dataclass(eq=False)
class Member:
    """One continuation of one prompt, from its submit to its end.

    prompt         the same object for all its continuations
    submitted      time of the submit, in seconds of the monotonic clock, like all times here
    deadline       latest time of the end
    last_token     time of the last token, or of the submit
    draft_tokens   how many tokens may be drafted for a call, at most; 0 drafts none
    cache_salt, cache_generated  see Generate
    tenant         whose it is
    overtaken      see schedule.py
    source         the source of its factors, set when its cohort is complete
    queued, first_token, adapters  see FinishedRow
    place          counts the members of a batch in the order in which they were admitted
    """

    stream: Stream
    prompt: Prompt
    row: Row
    submitted: float
    deadline: float
    last_token: float
    draft_tokens: int
    cache_salt: str
    cache_generated: bool
    tenant: Tenant
    overtaken: int = 0
    source: FactorSource = field(init=False)
    queued: float | None = None
    first_token: float | None = None
    adapters: tuple[str, ...] = ()
    place: int = field(init=False)
    _lookup: PromptLookup | None = None

    @property
    def key(self) -> Hashable:
        return self.source.key

    def key_at(self, position: int) -> Hashable:
        """Return the key of the factor set that reads a token of the prompt."""
        return NO_UPDATE if position < self.prompt.start else self.key

    def draft(self) -> list[int]:
        """Return tokens that may follow the row's last."""
        # The last new token is never read, so a draft ends before it.
        limit = min(self.draft_tokens, self.row.limit - len(self.row.token_ids) - 1)
        if limit < 1:
            return []
        if self._lookup is None:
            self._lookup = PromptLookup(self.prompt.ids)
        self._lookup.extend(self.row.token_ids)
        return self._lookup.draft(limit)


def members_of(rows: Sequence[Row], stream: Stream, generate: Generate, tenant: Tenant = NOBODY) -> list[Member]:
    """Return the members of rows that are submitted now. Rows of one prompt share it."""
    now = time.monotonic()
    end = math.inf if generate.deadline is None else now + generate.deadline
    prompts = {id(row.prompt): Prompt(row.prompt) for row in rows}
    return [
        Member(
            stream, prompts[id(row.prompt)], row, now, end, now, generate.prompt_lookup_num_tokens,
            generate.cache_salt, generate.cache_generated, tenant,
        )
        for row in rows
    ]  # fmt: skip
