"""The generation loop: iterations, each with calls that prefill and a step of all ready rows.

`Engine` drives it in its own thread, `generate_rows` in the caller's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import ChameleonError, GraphError, RequestError
from chameleon_deploy.runtime.backend import Backend
from chameleon_deploy.runtime.decode.logits import HostLogits
from chameleon_deploy.runtime.decode.prefix_cache import PrefixCache
from chameleon_deploy.runtime.decode.prompt_lookup import check_drafts
from chameleon_deploy.runtime.decode.schedule import Schedule, admissible
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.device.static_batch import StaticBatch
from chameleon_deploy.runtime.engine.batch import Batch, ContinuousBatch
from chameleon_deploy.runtime.engine.factor_table import FactorTable, MadeFactors
from chameleon_deploy.runtime.engine.iteration import FinishedRow, Iteration
from chameleon_deploy.runtime.engine.member import Member, members_of
from chameleon_deploy.runtime.engine.stream import Stream
from chameleon_deploy.runtime.engine.tenants import Crowding, Shares, Tenant, may_begin
from chameleon_deploy.runtime.factor_sources import FactorSource
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.runtime.generation import FinishReason, Generate, OnError, Row, Token, choosers
from chameleon_deploy.runtime.sampling import Choice


class Loop:
    """Rows that wait, are admitted to the batch, and end. For one thread.

    waiting  in order of arrival
    """

    def __init__(
        self, batch: Batch, table: FactorTable, tokenizer: Any, eos_token_id: int, errors: OnError = "row"
    ) -> None:
        """Take a batch without members.

        eos_token_id  ends a row; -1 ends none
        errors        "row" ends the rows that an error concerns; "raise" lets the first one out of `iterate`
        """
        self.batch, self.table, self.waiting = batch, table, list[Member]()
        self._tokenizer, self._eos_token_id, self._errors = tokenizer, eos_token_id, errors
        self._ended: set[Member] = set()  # since the last drop
        self._tokens: dict[Stream, list[Token]] = {}
        self._report = Iteration()
        self._shares, self._crowding = Shares(), Crowding()
        self._waiting_names: set[str] = set()  # of tenants, in the current iteration

    def __bool__(self) -> bool:
        """Return whether there is anything to do."""
        return bool(self.waiting or self.batch.members)

    def cancel(self) -> None:
        """Cancel every row."""
        for member in self.waiting + self.batch.members:
            member.stream.cancel()

    def iterate(self) -> tuple[dict[Stream, list[Token]], Iteration]:
        """Run one iteration.  -> the tokens of each stream, and the record of the iteration"""
        self._end_expired()
        if self._ended:
            self._drop()
        self._waiting_names.clear()
        if self.waiting:
            self._admit()
        if self.batch.ready < len(self.batch.members):
            self._read()
        self._step()
        return self._take_result()

    def fail(self, error: ChameleonError) -> tuple[dict[Stream, list[Token]], Iteration]:
        """End every row after `iterate` has raised.  -> as `iterate`"""
        self._end_all([member for member in self.waiting + self.batch.members if member not in self._ended], error)
        return self._take_result()

    def refuse(self, members: Sequence[Member], error: Exception) -> None:
        """End rows that neither wait nor run yet."""
        self._end_all(members, error)

    def _take_result(self) -> tuple[dict[Stream, list[Token]], Iteration]:
        result = self._tokens, self._report
        self._tokens, self._report = {}, Iteration()
        return result

    def _end_expired(self) -> None:
        """End the rows that were cancelled or are past their deadline."""
        now = time.monotonic()
        for member in self.waiting + self.batch.members:
            if member not in self._ended and (member.stream.cancelled or now >= member.deadline):
                self._end(member, "cancelled" if member.stream.cancelled else "deadline")
        if self.waiting:
            self.waiting = [member for member in self.waiting if member not in self._ended]

    def _drop(self) -> None:
        ended = [member for member in self.batch.members if member in self._ended]
        self.batch.drop(self._ended)
        for member in ended:
            self.table.release(member.key)
        self._ended.clear()

    def _admit(self) -> None:
        members = self.batch.members
        running, rows = Counter[Hashable](m.stream for m in members), Counter(m.tenant.name for m in members)
        places = self.batch.room() + len(members)
        self._waiting_names = {member.tenant.name for member in self.waiting}
        self._shares.keep(list(dict.fromkeys([*rows, *(member.tenant.name for member in self.waiting)])))

        def next_tenant(tenants: Iterable[Tenant]) -> Tenant | None:
            free = self.batch.room()
            within = [tenant for tenant in tenants if tenant.rows is None or rows[tenant.name] < tenant.rows]
            may = [tenant for tenant in within if may_begin(tenant, rows[tenant.name], free, places)]
            return self._shares.turn(may, within) if may else None

        in_turn = admissible(self.waiting, running, self.table.__contains__, lambda: self.table.is_full, next_tenant)
        taken = set[Member]()
        try:
            while self.batch.room() and (member := next(in_turn, None)):
                taken.add(member)
                rows[member.tenant.name] += 1
                self._shares.charge(member.tenant, len(member.prompt.ids), self._waiting_names)
                self._admit_one(member)
        finally:
            self.waiting = [member for member in self.waiting if member not in taken]

    def _admit_one(self, member: Member) -> None:
        hit = member.key in self.table
        try:
            self.table.acquire(member.source)
        except Exception as error:  # also errors of the hypernetwork's session
            self._end_all([member], error)
            return
        self.batch.admit(member)
        self._report.factor_set_hits += hit
        member.queued = time.monotonic() - member.submitted
        self._report.queued.append(member.queued)

    def _read(self) -> None:
        started, waiting = time.perf_counter(), [member.tenant for member in self.waiting]
        tenants = [member.tenant for member in self.batch.members]
        crowding = self._crowding.names(waiting + tenants, waiting + tenants[self.batch.ready :])
        try:
            self._report.prefilled_tokens = self.batch.prefill(crowding)
        except Exception as error:
            self._end_all(self.batch.to_prefill(), error)
        self._report.chunk = time.perf_counter() - started

    def _step(self) -> None:
        members = self.batch.members[: self.batch.ready]
        if not members:
            return
        self._report.rows, self._report.factor_sets = len(members), len(self.table)
        started, draft = time.perf_counter(), self.batch.draft()
        try:
            logits = self.batch.step(draft)
        except Exception as error:
            self._end_all(self.batch.to_step(), error)
            return
        self._report.step = time.perf_counter() - started
        if draft:
            self._accept(members[0], draft, np.asarray(logits))
            return
        for member, choose in zip(members, choosers([member.row.sampler for member in members], logits), strict=True):
            self._append(member, choose)

    def _accept(self, member: Member, draft: Sequence[int], logits: FloatArray) -> None:
        """Append tokens to the only row until one differs from its draft."""
        for i in range(len(draft) + 1):
            (choose,) = choosers([member.row.sampler], HostLogits(logits[i : i + 1]))
            self._append(member, choose)
            if member in self._ended or (i < len(draft) and member.row.token_ids[-1] != draft[i]):
                break
        self.batch.cut()

    def _append(self, member: Member, choose: Callable[[], Choice]) -> None:
        row = member.row
        try:
            token = row.append(choose(), self._tokenizer, self._eos_token_id)
        except Exception as error:
            self._end_all([member], error)
            return
        self._shares.charge(member.tenant, 1, self._waiting_names)
        now = time.monotonic()
        if member.first_token is None:
            member.first_token = now - member.submitted
            self._report.first_tokens.append(member.first_token)
        else:
            self._report.later_tokens.append(now - member.last_token)
        member.last_token = now
        if token.generation is None:
            self._tokens.setdefault(member.stream, []).append(token)
        else:
            self._finish(member, token, token.generation.finish_reason)

    def _end(self, member: Member, reason: FinishReason, error: ChameleonError | None = None) -> None:
        self._finish(member, member.row.end(reason, error), reason)

    def _end_all(self, members: Sequence[Member], error: Exception) -> None:
        if self._errors == "raise":
            raise error
        for member in members:
            self._end(member, "error", _as_error(error))

    def _finish(self, member: Member, token: Token, reason: FinishReason) -> None:
        self._tokens.setdefault(member.stream, []).append(token)
        self._ended.add(member)
        row, seconds = member.row, time.monotonic() - member.submitted
        finished = FinishedRow(
            member.stream.mode, row.cluster_id, reason, len(row.prompt), len(row.token_ids), seconds, member.queued,
            member.first_token, member.adapters, member.tenant.name,
        )  # fmt: skip
        self._report.finished.append(finished)
        member.stream.finished.append(finished)


def open_batch(
    backend: Backend,
    table: FactorTable,
    rows: int,
    capacity: int,
    schedule: Schedule,
    prefixes: PrefixCache | None = None,
) -> Batch:
    """Return a continuous batch if the decoder has slots, else a static one, which has no prefix cache."""
    if isinstance(backend.decoder, SharedCacheDecoder):
        return ContinuousBatch(backend.decoder.slots(rows, capacity), table, schedule, prefixes)
    return StaticBatch(backend, backend.decoder, table, rows)


def generate_rows(
    rows: Sequence[Row],
    factors: RowFactors,
    backend: Backend,
    tokenizer: Any,
    eos_token_id: int,
    generate: Generate = Generate(),  # noqa: B008  (immutable)
    errors: OnError = "raise",
) -> Iterator[Token]:
    """Yield the tokens of rows that begin at once, in the caller's thread; within a step in the order of the rows.

    Every prompt is read before the first step, in calls as large as pays.

    factors   of the rows, in the decoder's memory
    generate  its deadline and drafts; the rest is in the rows
    errors    see Loop

    Raises ProviderError or InputError for drafts that the decoder would read to other tokens.
    """
    decoder = backend.decoder
    check_drafts(generate.prompt_lookup_num_tokens, decoder)
    table = MadeFactors(factors.sets)
    capacity = max(len(row.prompt) + row.limit - 1 for row in rows)
    schedule = Schedule(decoder.prefill_tokens if isinstance(decoder, SharedCacheDecoder) else 0, reads_all=True)
    loop = Loop(open_batch(backend, table, len(rows), capacity, schedule), table, tokenizer, eos_token_id, errors)
    stream = Stream([row.prompt for row in rows], [row.cluster_id for row in rows], "none", 1)
    loop.waiting = members_of(rows, stream, generate)
    for row, (member, key) in enumerate(zip(loop.waiting, factors.factor_ids.tolist(), strict=True)):
        member.source = FactorSource(key, factors.sets, lambda sets: sets[0])
        member.prompt.start = 0 if factors.starts is None else int(factors.starts[row])
    return _tokens(loop)


def _tokens(loop: Loop) -> Iterator[Token]:
    while loop:
        tokens, _ = loop.iterate()
        for of_stream in tokens.values():
            yield from of_stream if len(of_stream) == 1 else sorted(of_stream, key=lambda token: token.row)


def _as_error(error: Exception) -> ChameleonError:
    # A graph that fails is no fault of the request: its caller learns that the call failed.
    if isinstance(error, ChameleonError) and not isinstance(error, GraphError):
        return error
    wrapped = RequestError(f"the decoder failed in a call that this request was part of: {error}")
    wrapped.__cause__ = error
    return wrapped
