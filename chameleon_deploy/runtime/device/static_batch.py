"""The batch of decoders without slots, which are those of devices and of the portable graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from chameleon_deploy.runtime.decode.decoder import StaticDecoder
from chameleon_deploy.runtime.decode.logits import Logits
from chameleon_deploy.runtime.factors import RowFactors

if TYPE_CHECKING:  # the loop of the engine's folder drives this batch
    from chameleon_deploy.runtime.backend import Backend
    from chameleon_deploy.runtime.engine.factor_table import FactorTable
    from chameleon_deploy.runtime.engine.member import Member


class StaticBatch:
    """A batch that runs to its end; members join only while nothing runs. See `engine.batch.Batch`."""

    def __init__(self, backend: Backend, decoder: StaticDecoder, table: FactorTable, rows: int) -> None:
        self._decoder, self._place, self._table, self._rows = decoder, backend.place, table, rows
        self.members: list[Member] = []
        self._running: tuple[Any, RowFactors] | None = None  # cache and factors of the members

    @property
    def ready(self) -> int:
        return len(self.members)

    @property
    def cached_tokens(self) -> int:
        return 0 if self._running is None else int(self._running[0].lengths.sum())

    def room(self) -> int:
        return self._rows - len(self.members) if self._running is None else 0

    def admit(self, member: Member) -> None:
        self.members.append(member)

    def drop(self, gone: Collection[Member]) -> None:
        kept = np.array([i for i, member in enumerate(self.members) if member not in gone], np.int64)
        self.members = [self.members[i] for i in kept]
        if not self.members:
            self._running = None
        elif self._running is not None:
            cache, factors = self._running
            self._running = self._decoder.select(cache, kept), factors.rows(kept)

    def prefill(self, crowding: Collection[str] = ()) -> int:
        return 0

    def to_prefill(self) -> list[Member]:
        return []

    def to_step(self) -> list[Member]:
        return self.members

    def draft(self) -> list[int]:
        return []

    def cut(self) -> None:
        """There is no draft to cut off."""

    def step(self, draft: Sequence[int] = ()) -> Logits:
        rows, decoder = [member.row for member in self.members], self._decoder
        if self._running is not None:
            cache, factors = self._running
            return decoder.step(np.array([row.token_ids[-1] for row in rows]), factors, cache)
        factor_ids = self._table.of_rows([member.key for member in self.members]).factor_ids
        starts = np.array([member.prompt.start for member in self.members], np.int64)
        factors = RowFactors(self._place(self._table.stack()), factor_ids, starts)
        capacity = max(len(row.prompt) + row.limit - 1 for row in rows)
        logits, cache = decoder.prefill([row.prompt for row in rows], factors, capacity)
        self._running = cache, factors
        return logits
