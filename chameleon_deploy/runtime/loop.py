"""The work of the engine's thread: iterations, each with a call that prefills and a step of all ready rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from chameleon_deploy.errors import ChameleonError, GraphError, RequestError
from chameleon_deploy.runtime.batch import Batch, Member
from chameleon_deploy.runtime.factor_table import FactorTable
from chameleon_deploy.runtime.generation import FinishReason, Token, choosers
from chameleon_deploy.runtime.iteration import FinishedRow, Iteration
from chameleon_deploy.runtime.sampling import Choice
from chameleon_deploy.runtime.schedule import take_next
from chameleon_deploy.runtime.stream import Stream


class Loop:
    """Rows that wait, are admitted to the batch, and end. For one thread.

    waiting  in order of arrival
    """

    def __init__(self, batch: Batch, table: FactorTable, tokenizer: Any, eos_token_id: int) -> None:
        self.batch, self.table, self.waiting = batch, table, list[Member]()
        self._tokenizer, self._eos_token_id = tokenizer, eos_token_id
        self._ended: set[Member] = set()  # still in the batch
        self._tokens: dict[Stream, list[Token]] = {}
        self._report = Iteration()

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
        self._drop()
        self._admit()
        self._read()
        self._step()
        return self._take_result()

    def fail(self, error: ChameleonError) -> tuple[dict[Stream, list[Token]], Iteration]:
        """End every row after `iterate` has raised.  -> as `iterate`"""
        self._end_all([member for member in self.waiting + self.batch.members if member not in self._ended], error)
        return self._take_result()

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
        self.waiting = [member for member in self.waiting if member not in self._ended]

    def _drop(self) -> None:
        ended = [member for member in self.batch.members if member in self._ended]
        if ended:
            self.batch.drop(ended)
            for member in ended:
                self.table.release(member.key)
        self._ended.clear()

    def _admit(self) -> None:
        while self.batch.room() and (
            member := take_next(self.waiting, self.table.__contains__, self.table.is_full)
        ):  # fmt: skip
            hit = member.key in self.table
            try:
                self.table.acquire(member.source)
            except Exception as error:  # also errors of the hypernetwork's session
                self._end_all([member], error)
                self._ended.discard(member)  # it never was in the batch
                continue
            self.batch.admit(member)
            self._report.factor_set_hits += hit
            self._report.queued.append(time.monotonic() - member.submitted)

    def _read(self) -> None:
        started = time.perf_counter()
        try:
            self._report.chunk_tokens = self.batch.prefill()
        except Exception as error:
            self._end_all(self.batch.to_prefill(), error)
        self._report.chunk = time.perf_counter() - started

    def _step(self) -> None:
        members = list(self.batch.members[: self.batch.ready])
        if not members:
            return
        self._report.rows, self._report.factor_sets = len(members), len(self.table)
        started = time.perf_counter()
        try:
            logits = self.batch.step()
        except Exception as error:
            self._end_all(self.batch.to_step(), error)
            return
        self._report.step = time.perf_counter() - started
        for member, choose in zip(members, choosers([member.row.sampler for member in members], logits), strict=True):
            try:
                self._append(member, choose)
            except Exception as error:
                self._end_all([member], error)

    def _append(self, member: Member, choose: Callable[[], Choice]) -> None:
        row = member.row
        token = row.append(choose(), self._tokenizer, self._eos_token_id)
        now = time.monotonic()
        times = self._report.first_tokens if len(row.token_ids) == 1 else self._report.later_tokens
        times.append(now - member.last_token)
        member.last_token = now
        if token.generation is None:
            self._tokens.setdefault(member.stream, []).append(token)
        else:
            self._finish(member, token, token.generation.finish_reason)

    def _end(self, member: Member, reason: FinishReason, error: ChameleonError | None = None) -> None:
        self._finish(member, member.row.end(reason, error), reason)

    def _end_all(self, members: Sequence[Member], error: Exception) -> None:
        for member in members:
            self._end(member, "error", _as_error(error))

    def _finish(self, member: Member, token: Token, reason: FinishReason) -> None:
        self._tokens.setdefault(member.stream, []).append(token)
        self._ended.add(member)
        row, seconds = member.row, time.monotonic() - member.submitted
        finished = FinishedRow(member.stream.mode, row.cluster_id, reason, len(row.prompt), len(row.token_ids), seconds)
        self._report.finished.append(finished)


def _as_error(error: Exception) -> ChameleonError:
    # A graph that fails is no fault of the request: its caller learns that the call failed.
    if isinstance(error, ChameleonError) and not isinstance(error, GraphError):
        return error
    wrapped = RequestError(f"the decoder failed in a call that this request was part of: {error}")
    wrapped.__cause__ = error
    return wrapped
