"""Admission in order of arrival, with a bounded number of exceptions; and the table of factor sets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from chameleon_deploy.errors import NumericError
from chameleon_deploy.runtime.decode.schedule import (
    MAX_OVERTAKES,
    MIN_PREFILL_TOKENS,
    admissible,
    chunk_length,
    joined,
    most_rows,
    short_chunk,
)
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.factor_sources import FactorSource
from chameleon_deploy.runtime.factors import FactorSets, zero_set


@dataclass(eq=False)
class Row:
    key: str
    stream: str = ""
    overtaken: int = 0
    tenant: str = ""


def admitted(
    queue: list[Row], resident: set[str], is_full: bool, running: Mapping[Hashable, int] = MappingProxyType({})
) -> list[str]:
    return [row.key for row in admissible(queue, running, resident.__contains__, lambda: is_full)]


def test_rows_go_to_the_request_that_has_the_fewest() -> None:
    queue = [Row("a1", "a"), Row("a2", "a"), Row("b1", "b"), Row("b2", "b"), Row("c1", "c")]
    assert admitted(queue, set(), False, {"a": 3}) == ["b1", "c1", "b2", "a1", "a2"]
    assert admitted(queue[:3], set(), False, {"b": 1}) == ["a1", "a2", "b1"]


def test_a_request_keeps_its_turn_behind_others_that_come_and_go() -> None:
    """Requests of a single row come for ever; whoever has none in the batch and came first is next."""
    queue = [Row("a", "a"), *(Row(f"b{i}", f"b{i}") for i in range(100))]
    assert admitted(queue, set(), False, {"a": 1})[0] == "b0"
    assert admitted(queue, set(), False)[0] == "a"


@pytest.mark.parametrize(("free", "most"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2), (264, 132)])
def test_no_request_takes_all_places(free: int, most: int) -> None:
    assert most_rows(free) == most


def test_first_come_first_served_while_there_is_room() -> None:
    assert admitted([Row("a"), Row("b"), Row("c")], {"c"}, is_full=False) == ["a", "b", "c"]


def test_a_resident_set_overtakes_where_the_table_is_full() -> None:
    queue = [Row("a"), Row("b"), Row("c"), Row("c")]
    assert next(admissible(queue, {}, {"c"}.__contains__, lambda: True)).key == "c"
    assert [row.overtaken for row in queue] == [1, 1, 0, 0]
    assert admitted(queue, {"x"}, is_full=True) == []


def test_a_table_that_fills_up_holds_up_the_next() -> None:
    resident = set[Hashable]()
    found = []
    for row in admissible([Row(key) for key in "abca"], {}, resident.__contains__, lambda: len(resident) == 2):
        found.append(row.key)
        resident.add(row.key)
    assert found == ["a", "b", "a"]


def test_nobody_is_overtaken_for_ever() -> None:
    """Not within an iteration, and not over several."""
    queue = [Row("a"), *(Row("c") for _ in range(3 * MAX_OVERTAKES))]
    few = list(islice(admissible(queue, {}, {"c"}.__contains__, lambda: True), 5))
    queue = [row for row in queue if row not in few]
    assert admitted(queue, {"c"}, is_full=True) == ["c"] * (MAX_OVERTAKES - 5)
    assert admitted(queue, {"c"}, is_full=True) == []
    assert admitted(queue, {"c"}, is_full=False)[0] == "a"


@pytest.mark.parametrize("tokens", range(1, 40))
def test_a_prompt_is_read_in_chunks_of_which_the_last_is_no_single_token(tokens: int) -> None:
    chunks, unread = list[int](), tokens
    while unread:
        chunks.append(chunk_length(unread, 8))
        unread -= chunks[-1]
    assert sum(chunks) == tokens
    assert len(chunks) == -(-tokens // 8)
    assert all(1 <= chunk <= 8 for chunk in chunks)
    assert chunks[-1] > 1 or tokens == 1
    assert chunks[:-1] == [8] * (len(chunks) - 1) or (tokens % 8 == 1 and chunks[-2:] == [7, 2])


@pytest.mark.parametrize(
    ("lengths", "together"),
    [
        ([64], 1), ([64, 64], 2), ([64, 64, 1, 64], 2), ([128, 128], 1), ([300], 1), ([300, 2], 1), ([1, 1], 1),
        ([2, 5, 2], 3), ([0, 5], 1), ([16] * 8, 8), ([16] * 9, 8), ([40, 8], 2), ([41, 8], 1),
        ([42, 42, 10, 10], 3), ([10, 60], 1),
    ],
)  # fmt: skip
def test_prompts_are_read_together_while_padding_costs_less_than_calls(lengths: list[int], together: int) -> None:
    assert joined(lengths, 128) == together


def source(key: str, rank: int, value: float) -> FactorSource:
    tensors = {"A": np.full((1, rank, 3), value, np.float32), "B": np.full((1, rank, 5), value, np.float32)}
    return FactorSource(key, FactorSets(tensors), lambda sets: sets[0])


def stacked(table: FactorTable) -> dict[str, Any]:
    """Of each resident set its sum over A, which padding does not change."""
    return {str(key): float(np.asarray(table.set_of(key).sets.tensors["A"]).sum()) for key in table._references}


def test_sets_are_counted_stacked_and_padded() -> None:
    table = FactorTable(3)
    for key, rank, value in (("a", 2, 1.0), ("b", 4, 2.0), ("a", 2, 1.0), ("c", 1, 3.0)):
        table.acquire(source(key, rank, value))
    assert len(table) == 3
    assert table.is_full
    assert stacked(table) == {"a": 6.0, "b": 24.0, "c": 9.0}
    assert table.sets.tensors["A"].shape == (3, 4, 3)
    before = table.sets
    table.release("a")
    assert table.sets is before, "a set that is still in use was touched"
    table.release("a")
    table.release("b")
    assert stacked(table) == {"c": 9.0}
    assert table.sets.tensors["B"].shape == (1, 1, 5), "the rank of a set that left is still computed"
    table.acquire(source("d", 2, 1.0))
    assert stacked(table) == {"c": 9.0, "d": 6.0}
    assert np.asarray(table.sets.tensors["A"])[table.index("c"), 1:].sum() == 0


def test_a_stack_whose_rank_changes_keeps_its_memory() -> None:
    table, zeros = FactorTable(3), zero_set(FactorSets({"A": np.ones((1, 1, 3)), "B": np.ones((1, 1, 5))}))
    bound = []  # as calls of a decoder keep the stack that they were bound to last
    for _ in range(3):
        for key, rank in (("none", 1), ("a", 4), ("b", 2)):
            table.acquire(FactorSource(key, zeros, lambda sets: sets[0]) if key == "none" else source(key, rank, 2.0))
            bound.append(np.asarray(table.sets.tensors["A"]))
        assert stacked(table) == {"none": 0.0, "a": 24.0, "b": 12.0}
        table.release("a")
        assert stacked(table) == {"none": 0.0, "b": 12.0}
        table.release("b")
        table.release("none")
    # One array of each size that the stack ever grew to: of rank 1 at first, then of rank 4.
    assert len({array.__array_interface__["data"][0] for array in bound}) == 2


def test_a_stack_updates_nothing_as_long_as_none_of_its_sets_does() -> None:
    table, zeros = FactorTable(3), zero_set(FactorSets({"A": np.ones((1, 1, 3)), "B": np.ones((1, 1, 5))}))
    table.acquire(FactorSource("none", zeros, lambda sets: sets[0]))
    assert table.sets.updates_nothing
    table.acquire(source("a", 2, 1.0))
    table.acquire(FactorSource("none too", zeros, lambda sets: sets[0]))
    assert not table.sets.updates_nothing
    assert not table.set_of("a").sets.updates_nothing
    assert table.set_of("none too").sets.updates_nothing
    table.release("none")  # the last set takes its place
    assert not table.sets.updates_nothing
    table.release("a")
    assert table.sets.updates_nothing
    table.acquire(source("b", 1, 1.0))
    table.release("none too")
    assert not table.sets.updates_nothing


def test_a_set_that_is_not_finite_is_refused() -> None:
    table = FactorTable(2)
    table.acquire(source("a", 2, 1.0))
    with pytest.raises(NumericError):
        table.acquire(source("b", 2, float("nan")))
    assert stacked(table) == {"a": 6.0}


def test_a_short_chunk_is_a_quarter_and_no_less_than_any_chunk_may_have() -> None:
    assert [short_chunk(tokens) for tokens in (256, 40, 31, 8)] == [64, 10, MIN_PREFILL_TOKENS, MIN_PREFILL_TOKENS]
