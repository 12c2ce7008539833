"""The loop over a batch without a decoder: what it admits, charges and ends, in which order, and its times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from chameleon_deploy import Generate, Sampling
from chameleon_deploy.runtime.decode.logits import HostLogits
from chameleon_deploy.runtime.decode.schedule import Schedule
from chameleon_deploy.runtime.engine import loop as loop_module
from chameleon_deploy.runtime.engine import member as member_module
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.engine.iteration import FinishedRow
from chameleon_deploy.runtime.engine.loop import Loop, generate_rows
from chameleon_deploy.runtime.engine.member import Member, members_of
from chameleon_deploy.runtime.engine.stream import Stream
from chameleon_deploy.runtime.engine.tenants import NOBODY, QUANTUM, Tenant
from chameleon_deploy.runtime.factor_sources import FactorSource
from chameleon_deploy.runtime.factors import FactorSets, RowFactors
from chameleon_deploy.runtime.generation import Row, Token
from chameleon_deploy.runtime.sampling import Sampler

VOCAB = 16
TOKENIZER = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, "w0"))
Clock = SimpleNamespace


class Places:
    """A batch that reads every prompt at once, and whose every token is 7. See `Batch`.

    clock  moves by 3 seconds in a prefill and by 2 in a step
    """

    cached_tokens = 0

    def __init__(self, places: int, clock: Clock | None = None) -> None:
        self.members: list[Member] = []
        self.ready, self._places, self._clock = 0, places, clock

    def room(self) -> int:
        return self._places - len(self.members)

    def admit(self, member: Member) -> None:
        self.members.insert(0, member)  # the last comes first: rows are in no order

    def drop(self, gone: Collection[Member]) -> None:
        self.members = [member for member in self.members if member not in gone]
        self.ready = len(self.members)

    def prefill(self, crowding: Collection[str] = ()) -> int:
        unread = self.members[: len(self.members) - self.ready]
        self.ready = len(self.members)
        self._pass(3)
        return sum(len(member.prompt.ids) for member in unread)

    def to_prefill(self) -> list[Member]:
        return self.members[self.ready :]

    def to_step(self) -> list[Member]:
        return self.members

    def draft(self) -> list[int]:
        return []

    def step(self, draft: Sequence[int] = ()) -> HostLogits:
        self._pass(2)
        return HostLogits(np.tile(np.arange(VOCAB, dtype=np.float32) == 7, (self.ready, 1)).astype(np.float32))

    def cut(self) -> None: ...

    def _pass(self, seconds: float) -> None:
        if self._clock is not None:
            self._clock.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock whose time is `now`, of the loop and of its members."""
    clock = Clock(now=100.0)
    time = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    for module in (loop_module, member_module):
        monkeypatch.setattr(module, "time", time)
    return clock


def submitted(
    prompts: Sequence[Sequence[int]], limit: int = 2, tenant: Tenant = NOBODY, **generate: Any
) -> list[Member]:
    rows = [Row(i, ids, limit, Sampler(Sampling(), ids, 0), 4, is_shown=False) for i, ids in enumerate(prompts)]
    members = members_of(rows, Stream(prompts, [4] * len(prompts), "none", 1), Generate(**generate), tenant)
    for member in members:
        member.source = FactorSource("none", 0, lambda items: FactorSets({}))
        member.prompt.start = 0
    return members


def opened(batch: Places, *members: Member) -> Loop:
    loop = Loop(batch, FactorTable(2), TOKENIZER, eos_token_id=-1)
    loop.waiting = list(members)
    return loop


def test_an_iteration_reports_its_times(clock: Clock) -> None:
    members = submitted([[1, 2, 3], [4]])
    loop, stream = opened(Places(2, clock), *members), members[0].stream
    clock.now = 104.0
    tokens, report = loop.iterate()  # prefills for 3 seconds and steps for 2
    assert [token.token_id for token in tokens[stream]] == [7, 7]
    assert (report.rows, report.factor_sets, report.factor_set_hits, report.prefilled_tokens) == (2, 1, 1, 4)
    assert (report.chunk, report.step) == (3, 2)
    assert (report.queued, report.first_tokens, report.later_tokens) == ([4, 4], [9, 9], [])
    clock.now = 120.0
    _, report = loop.iterate()
    assert (report.chunk, report.step, report.prefilled_tokens) == (0, 2, 0)
    assert (report.queued, report.first_tokens, report.later_tokens) == ([], [], [13, 13])
    finished = [FinishedRow("none", 4, "length", tokens, 2, 22, 4, 9) for tokens in (1, 3)]
    assert report.finished == stream.finished == finished
    assert loop.iterate()[1].rows == 0
    assert not loop and not loop._ended


def test_a_row_ends_at_its_deadline(clock: Clock) -> None:
    loop = opened(Places(1, clock), *(members := submitted([[1]], deadline=3.0)))
    clock.now = 103.0
    (token,) = loop.iterate()[0][members[0].stream]
    assert token.generation and token.generation.finish_reason == "deadline"


def test_a_tenant_has_as_many_rows_as_its_limit() -> None:
    tenant = Tenant("a", rows=2)
    loop = opened(Places(9), *submitted([[1]] * 4, tenant=tenant))
    loop.iterate()
    assert (len(loop.batch.members), len(loop.waiting)) == (2, 2)


def test_the_last_of_all_places_is_kept_for_another_tenant() -> None:
    loop = opened(Places(3), *submitted([[1]], limit=9, tenant=Tenant("a")))
    loop.iterate()
    loop.waiting = submitted([[1], [1]], tenant=Tenant("a"))
    loop.iterate()
    assert (len(loop.batch.members), len(loop.waiting)) == (2, 1)
    loop.waiting += submitted([[1]], tenant=Tenant("b"))
    loop.iterate()
    assert Counter(member.tenant.name for member in loop.batch.members) == {"a": 2, "b": 1}


def test_tokens_are_charged_while_another_tenant_waits() -> None:
    """The first tenant keeps what a prompt of 5 tokens and each new token leave of its quantum."""
    loop = opened(Places(1), *submitted([[1] * 5], 3, Tenant("a")), *submitted([[2]], 3, Tenant("b")))
    loop.iterate()
    assert loop._shares._deficits == {"a": QUANTUM - 5 - 1, "b": QUANTUM}
    loop.iterate()
    assert loop._shares._deficits["a"] == QUANTUM - 5 - 2
    loop.waiting.clear()
    loop.iterate()  # nobody waits
    assert loop._shares._deficits["a"] == QUANTUM - 5 - 2


def test_generate_rows_begins_all_rows_and_orders_the_tokens_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, found = Places(3), list[Any]()

    def open_batch(*arguments: Any) -> Places:
        found.extend(arguments)
        return batch

    monkeypatch.setattr(loop_module, "open_batch", open_batch)
    prompts = [[1, 2, 3], [4], [5, 6]]
    rows = [Row(i, ids, (1, 4, 2)[i], Sampler(Sampling(), ids, 0), -1) for i, ids in enumerate(prompts)]
    factors = RowFactors(FactorSets({}), np.zeros(3, np.int64))
    backend: Any = SimpleNamespace(decoder=SimpleNamespace())
    tokens = generate_rows(rows, factors, backend, TOKENIZER, -1)
    first = next(tokens)
    assert [member.prompt.start for member in batch.members] == [0, 0, 0]
    assert batch.members[0].stream.n == 1
    order = [(token.row, token.token_id) for token in (first, *tokens)]
    assert order == [(row, 7) for row in (0, 1, 2, 1, 2, 1, 1)]
    assert found[0] is backend and found[2:] == [3, 4, Schedule(0, reads_all=True)]


def test_an_error_of_a_row_is_raised_by_generate_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Places):
        def step(self, draft: Sequence[int] = ()) -> HostLogits:
            raise MemoryError("none left")

    monkeypatch.setattr(loop_module, "open_batch", lambda *_: Failing(1))
    rows = [Row(0, [1], 1, Sampler(Sampling(), [1], 0), -1)]
    backend: Any = SimpleNamespace(decoder=SimpleNamespace())
    tokens = generate_rows(rows, RowFactors(FactorSets({}), np.zeros(1, np.int64)), backend, TOKENIZER, -1)
    with pytest.raises(MemoryError, match="none left"):
        list[Token](tokens)
