"""A continuous batch over slots without a decoder: which prompts each call reads, copies or leaves to the next."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chameleon_deploy import Generate, Sampling
from chameleon_deploy.runtime.decode.schedule import Schedule
from chameleon_deploy.runtime.engine.batch import FORKED_PER_PREFILL, ContinuousBatch
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.engine.member import Member, members_of
from chameleon_deploy.runtime.engine.stream import Stream
from chameleon_deploy.runtime.engine.tenants import Tenant
from chameleon_deploy.runtime.factor_sources import FactorSource
from chameleon_deploy.runtime.factors import FactorSets, RowFactors
from chameleon_deploy.runtime.generation import Row
from chameleon_deploy.runtime.sampling import Sampler

CHUNK, VOCAB = 16, 4


class Slots:
    """Rows of token ids in place of keys and values. See `Slots` of the runtime.

    calls  of `prefill`: the first token of each row and how many tokens it read
    """

    is_exact = False

    def __init__(self, rows: int) -> None:
        self.lengths, self.logits = np.zeros(rows, np.int64), np.zeros((rows, VOCAB), np.float32)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.calls: list[list[tuple[int, int]]] = []
        self.forks: list[int] = []
        self.stepped: list[RowFactors] = []

    def admit(self, row: int) -> None:
        self._set(row, [])

    def prefill(self, first: int, rows: Sequence[Sequence[int]], factors: RowFactors, num_logits: int) -> Any:
        self.calls.append([(ids[0], len(ids)) for ids in rows])
        for row, ids in enumerate(rows, first):
            self._set(row, [*self.tokens[row], *ids])
        return np.zeros((len(rows), num_logits, VOCAB), np.float32)

    def fork(self, source: int, target: int, length: int) -> None:
        self.forks.append(length)
        self._set(target, self.tokens[source][:length])

    def move(self, source: int, target: int) -> None:
        self._set(target, self.tokens[source])

    def swap(self, a: int, b: int) -> None:
        first, second = self.tokens[a], self.tokens[b]
        self._set(a, second)
        self._set(b, first)

    def step(self, token_ids: Sequence[int], factors: RowFactors) -> None:
        self.stepped.append(factors)

    def _set(self, row: int, tokens: list[int]) -> None:
        self.tokens[row] = tokens
        self.lengths[row] = len(tokens)


def prompt(name: int, length: int) -> list[int]:
    return [name] * length


def submitted(*prompts: Sequence[int], tenant: str = "", n: int = 1, key: Hashable = "none") -> list[Member]:
    """Return n members for each prompt, whose key the table has."""
    rows = [Row(i, ids, 9, Sampler(Sampling(), ids, 0), -1) for ids in prompts for i in range(n)]
    members = members_of(rows, Stream(prompts, [-1] * len(prompts), "none", n), Generate(), Tenant(tenant))
    for member in members:
        member.source = FactorSource(key, 0, lambda items: FactorSets({}))
        member.prompt.start = 0
    return members


def opened(*members: Member, reads_all: bool = False) -> ContinuousBatch:
    table = FactorTable(4)
    slots: Any = Slots(len(members) + 2)
    batch = ContinuousBatch(slots, table, Schedule(CHUNK, reads_all))
    for member in members:
        table.acquire(member.source)
        batch.admit(member)
    return batch


def calls(batch: ContinuousBatch, crowding: Sequence[str] = ()) -> list[list[tuple[int, int]]]:
    """Prefill until every prompt is read. -> the calls of the decoder"""
    while batch.ready < len(batch.members):
        batch.prefill(crowding)
    slots: Any = batch._slots
    for place, member in enumerate(batch.members):
        assert slots.tokens[place] == list(member.prompt.ids)
    found: list[list[tuple[int, int]]] = slots.calls
    return found


def test_two_tenants_take_turns_call_by_call() -> None:
    batch = opened(*submitted(prompt(1, 48), tenant="a"), *submitted(prompt(2, 32), tenant="b"))
    assert calls(batch) == [[(1, 16)], [(2, 16)], [(1, 16)], [(2, 16)], [(1, 16)]]


def test_three_tenants_take_turns_and_each_goes_on_with_what_it_has_begun() -> None:
    of_a = submitted(prompt(1, 32), prompt(2, 16), tenant="a")
    batch = opened(*of_a, *submitted(prompt(3, 32), tenant="b"), *submitted(prompt(4, 32), tenant="c"))
    names = [name for call in calls(batch) for name, _ in call]
    assert names == [1, 3, 4, 1, 3, 4, 2]


def test_the_rows_of_one_tenant_are_read_in_their_order() -> None:
    batch = opened(*submitted(prompt(1, 32), prompt(2, 32), tenant="a"))
    assert calls(batch) == [[(1, 16)], [(1, 16)], [(2, 16)], [(2, 16)]]


def test_a_crowding_tenant_reads_short_chunks() -> None:
    batch = opened(*submitted(prompt(1, 16), tenant="a"), *submitted(prompt(2, 16), tenant="b"))
    assert calls(batch, crowding=["a"]) == [[(1, 8)], [(2, 16)], [(1, 8)]]


def test_prompts_are_joined_in_short_calls_only_while_several_tenants_have_some() -> None:
    def few() -> list[Member]:
        return submitted(prompt(1, 8), tenant="a")

    def many() -> list[Member]:
        return submitted(*(prompt(i, 4) for i in (2, 3, 4, 5)), tenant="b")

    assert calls(opened(*few(), *many())) == [[(1, 8)], [(2, 4), (3, 4), (4, 4), (5, 4)]]
    assert calls(opened(*many(), *few())) == [[(2, 4), (3, 4)], [(1, 8)], [(4, 4), (5, 4)]]


def test_a_schedule_that_reads_all_counts_the_tokens_of_every_call() -> None:
    batch = opened(*submitted(prompt(1, 32), prompt(2, 10), prompt(3, 12)), reads_all=True)
    assert batch.prefill() == 54
    assert batch.ready == 3


def test_copies_of_a_prompt_are_bounded_in_one_call() -> None:
    batch = opened(*submitted(prompt(1, CHUNK * FORKED_PER_PREFILL // 2), n=6), reads_all=True)
    batch._schedule = Schedule(CHUNK)
    while not batch.ready:
        batch.prefill()
    slots: Any = batch._slots
    first = len(slots.forks)
    assert first == 2  # of as many tokens as are copied in a call
    batch.prefill()
    assert len(slots.forks) - first == 2


class Prefixes(SimpleNamespace):
    """A prefix cache that has nothing yet, and will have the beginnings of what the next call reads."""

    def __init__(self) -> None:
        super().__init__(keep=lambda *_: None, begin=lambda *_, **__: None, restore=lambda *_: False)

    def beginning(self, member: Member) -> int:
        return member.prompt.ids[0]

    def will_have(self, member: Member, beginnings: set[int]) -> bool:
        return self.beginning(member) in beginnings


def test_a_prompt_waits_for_the_prefix_that_the_call_before_it_reads() -> None:
    batch = opened(*submitted(prompt(1, 4), prompt(2, 4), prompt(1, 5), prompt(3, 4)))
    batch._prefixes = Prefixes()  # type: ignore[assignment]
    assert calls(batch) == [[(1, 4), (2, 4)], [(1, 5), (3, 4)]]


def test_a_step_has_the_tables_factors_anew_only_where_they_changed() -> None:
    batch = opened(*submitted(prompt(1, 4), prompt(2, 4)))
    calls(batch)
    for member in batch.members:
        member.row.token_ids.append(1)
    slots: Any = batch._slots
    batch.step()
    batch.step()
    assert slots.stepped[1] is slots.stepped[0]
    (other,) = submitted(prompt(3, 4), key="other")
    batch._table.acquire(other.source)
    batch.step()
    assert slots.stepped[2] is not slots.stepped[0] and slots.stepped[2].sets is batch._table.sets
    batch.drop({batch.members[1]})
    batch.step()
    assert len(slots.stepped[3].factor_ids) == 1


@pytest.mark.parametrize("gone", [0, 1])
def test_a_tenant_alone_after_others_reads_as_if_they_had_never_come(gone: int) -> None:
    batch = opened(*submitted(prompt(1, 4), tenant="a"), *submitted(prompt(2, 4), tenant="b"))
    calls(batch)
    batch.drop(set(batch.members[gone:]) if gone else set(batch.members))
    for member in submitted(prompt(3, 20), prompt(4, 8), tenant="a"):
        batch._table.acquire(member.source)
        batch.admit(member)
    slots: Any = batch._slots
    slots.calls.clear()
    assert calls(batch) == [[(3, 16)], [(3, 4)], [(4, 8)]]
