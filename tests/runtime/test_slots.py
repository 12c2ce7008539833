"""Rows that join, read, step, move, fork and leave: each as if it were alone.

CHAMELEON_EXAMPLES=10000 makes as many random sequences; a run of the suite makes a few.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chameleon_deploy
from chameleon_deploy import Adapt, Runtime
from chameleon_deploy.runtime.decode.schedule import chunk_length
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.factors import RowFactors
from tests.conftest import Exported
from tests.rows import random_rows

EXAMPLES = int(os.environ.get("CHAMELEON_EXAMPLES", "40"))
ROWS, CAPACITY, SETS = 4, 24, 4
OPERATIONS = ("admit", "read", "read", "join", "step", "step", "move", "fork", "drop")
SEQUENCES = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**32 - 1)), min_size=4, max_size=24)

pytestmark = pytest.mark.timeout(max(600, EXAMPLES))
slowly = settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 1000)


class Alone:
    """What every row's logits must be: those after its tokens, read whole by the decoder."""

    def __init__(self, runtime: Runtime) -> None:
        assert isinstance(runtime.decoder, SharedCacheDecoder)
        self.decoder = runtime.decoder
        found = runtime.sources.of_rows(Adapt("centroid"), [], np.empty((SETS, 0), np.float32), np.arange(SETS))
        table = FactorTable(SETS)
        for source in found.sources:
            table.acquire(source)
        self.sets, self.own = table.sets, [table.set_of(source.key) for source in found.sources]

    def logits(self, tokens: list[int], factor_set: int) -> Any:
        return [np.array(piece)[0] for _, piece in self.decoder.all_logits([tokens], self.own[factor_set])][-1][-1]


class Rows:
    """Slots, and what each row of them holds."""

    def __init__(self, alone: Alone, rows: int = ROWS) -> None:
        self.alone, self.slots = alone, alone.decoder.slots(rows, CAPACITY)
        self.slots._cache.fill(np.nan if self.slots._cache.dtype == np.float32 else 127)  # nobody may read it
        self.tokens: list[list[int]] = []
        self.sets: list[int] = []

    def apply(self, operation: str, seed: int, check: Callable[[list[int], int, Any], None]) -> None:
        rng, rows = np.random.default_rng(seed), len(self.tokens)
        row, other = (int(rng.integers(max(rows, 1))) for _ in range(2))
        if operation == "admit" and rows < len(self.slots.lengths):
            self.slots.admit(rows)
            self.tokens.append([])
            self.sets.append(int(rng.integers(SETS)))
        elif rows == 0:
            return
        elif operation == "read" and (room := CAPACITY - len(self.tokens[row])) > 1:
            chunk = rng.integers(0, 512, rng.integers(1, min(room, 9))).tolist()
            logits = self.slots.prefill(row, [chunk], self.alone.own[self.sets[row]], num_logits=int(rng.integers(2)))
            self.tokens[row] += chunk
            for values in logits[0]:
                check(self.tokens[row], self.sets[row], values)
        elif operation == "join":
            self.join(rng, check)
        elif operation == "step":
            self.step(rng.integers(0, 512, rng.integers(1, rows + 1)).tolist(), check)
        elif operation == "move":
            self.slots.move(row, other)
            self.tokens[other], self.sets[other] = list(self.tokens[row]), self.sets[row]
        elif operation == "fork":
            length = int(rng.integers(len(self.tokens[row]) + 1))
            self.slots.fork(row, other, length)
            self.tokens[other] = self.tokens[row][:length]
        elif operation == "drop":
            self.slots.move(rows - 1, row)
            self.tokens[row], self.sets[row] = self.tokens[-1], self.sets[-1]
            del self.tokens[-1], self.sets[-1]

    def join(self, rng: np.random.Generator, check: Callable[[list[int], int, Any], None]) -> None:
        """Admit what there is room for, and read all of it in one call."""
        first, joining = len(self.tokens), range(len(self.tokens), len(self.slots.lengths))
        if not joining:
            return
        for row in joining:
            self.slots.admit(row)
            self.tokens.append(rng.integers(0, 512, rng.integers(1, CAPACITY)).tolist())
            self.sets.append(int(rng.integers(SETS)))
        factors = RowFactors(self.alone.sets, np.array(self.sets[first:], np.int64))
        logits = self.slots.prefill(first, self.tokens[first:], factors, num_logits=1)
        for row in joining:
            check(self.tokens[row], self.sets[row], logits[row - first, 0])

    def step(self, token_ids: list[int], check: Callable[[list[int], int, Any], None]) -> None:
        rows = len(token_ids)
        if max(map(len, self.tokens[:rows])) == CAPACITY:
            return
        factor_ids = np.array(self.sets[:rows], np.int64)
        logits = self.slots.step(token_ids, RowFactors(self.alone.sets, factor_ids))
        for row, token_id in enumerate(token_ids):
            self.tokens[row].append(token_id)
            check(self.tokens[row], self.sets[row], logits[row])
        assert self.slots.lengths[: len(self.tokens)].tolist() == [len(tokens) for tokens in self.tokens]


def run(alone: Alone, sequence: list[tuple[str, int]]) -> None:
    def check(tokens: list[int], factor_set: int, logits: Any) -> None:
        np.testing.assert_allclose(logits, alone.logits(tokens, factor_set), rtol=0, atol=1e-5)

    rows = Rows(alone)
    for operation, seed in sequence:
        rows.apply(operation, seed, check)


def test_every_row_is_as_if_alone(runtime: Runtime) -> None:
    alone = Alone(runtime)

    @slowly
    @given(sequence=SEQUENCES)
    def sequences(sequence: list[tuple[str, int]]) -> None:
        run(alone, sequence)

    sequences()


def test_of_a_llama_too(llama_bundle: Path) -> None:
    alone = Alone(chameleon_deploy.load(llama_bundle, threads=1))

    @slowly
    @given(sequence=SEQUENCES)
    def sequences(sequence: list[tuple[str, int]]) -> None:
        run(alone, sequence)

    sequences()


def fork_one_token_less(slots: Slots, source: int, target: int, length: int) -> None:
    slots._cache[:, target, :, : length - 1] = slots._cache[:, source, :, : length - 1]
    slots.lengths[target] = length


def forget_the_position(slots: Slots, row: int) -> None:
    """Admit without emptying the row."""


def read_with_the_first_rows_place(slots: Slots, source: int, target: int) -> None:
    Slots.fork(slots, source, 0, int(slots.lengths[source]))
    slots.lengths[target] = slots.lengths[source]


@pytest.mark.parametrize(
    ("method", "fault"),
    [("fork", fork_one_token_less), ("admit", forget_the_position), ("move", read_with_the_first_rows_place)],
)
def test_a_planted_fault_is_seen(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, method: str, fault: Any) -> None:
    alone = Alone(runtime)
    monkeypatch.setattr(Slots, method, fault)
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError):
        for _ in range(100):
            run(alone, [(str(rng.choice(OPERATIONS)), int(rng.integers(2**32))) for _ in range(24)])


def test_int8_rows_are_bitwise_equal_in_any_order(int8_runtime: Runtime) -> None:
    """The same prompts in the same chunks, at other places in the batch."""
    alone = Alone(int8_runtime)

    def logits(order: list[int], seed: int) -> dict[int, list[bytes]]:
        prompts, rng, rows = random_rows(seed, ROWS, 16), np.random.default_rng(seed), Rows(alone)
        fed, found = rng.integers(0, 512, (6, ROWS)), {row: list[bytes]() for row in order}
        for place, row in enumerate(order):
            rows.slots.admit(place)
            rows.sets.append(row)
            rows.tokens.append(list(prompts[row]))
            for start in range(0, len(prompts[row]), 5):
                rows.slots.prefill(place, [prompts[row][start : start + 5]], alone.own[row])
        for token_ids in fed.tolist():
            rows.step([token_ids[row] for row in order], lambda _, row, values: found[row].append(values.tobytes()))
        return found

    @slowly
    @given(order=st.permutations(range(ROWS)), seed=st.integers(0, 2**32 - 1))
    def orders(order: list[int], seed: int) -> None:
        assert logits(order, seed) == logits(list(range(ROWS)), seed)

    orders()


def logits_of_chunks(alone: Alone, prompt: list[int], chunks: list[int]) -> Any:
    slots, start = alone.decoder.slots(1, 128), 0
    for tokens in chunks:
        logits = slots.prefill(0, [prompt[start : start + tokens]], alone.own[0], num_logits=1)[0]
        start += tokens
    assert start == len(prompt)
    return logits[0]


def test_int8_prompts_in_one_call_are_cached_as_alone(int8_runtime: Runtime) -> None:
    """Bit for bit: steps, whose values are rounded to int8, then begin from the same."""
    alone = Alone(int8_runtime)
    prompts = [ids for ids in random_rows(3, ROWS, CAPACITY) if len(ids) > 1]
    together, single = (alone.decoder.slots(ROWS, CAPACITY) for _ in range(2))
    factors = RowFactors(alone.sets, np.arange(len(prompts)))
    logits = together.prefill(0, prompts, factors, num_logits=1)
    for row, ids in enumerate(prompts):
        expected = single.prefill(row, [ids], alone.own[row], num_logits=1)
        np.testing.assert_allclose(logits[row], expected[0], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(together._cache[:, row, :, : len(ids)], single._cache[:, row, :, : len(ids)])
    assert len({len(ids) for ids in prompts}) > 1


def test_int8_chunks_give_what_the_whole_prompt_gives(exported: Exported) -> None:
    """But for a last chunk of a single token, which the decoder takes for a step: so none is ever read."""
    alone = Alone(chameleon_deploy.load(exported("llama", "int8"), threads=1))
    for prompt in random_rows(8, 60, 100):
        whole = alone.logits(prompt, 0)
        chunks, unread = list[int](), len(prompt)
        while unread:
            chunks.append(chunk_length(unread, 16))
            unread -= chunks[-1]
        assert len(prompt) == 1 or 1 not in chunks
        np.testing.assert_allclose(logits_of_chunks(alone, prompt, chunks), whole, rtol=0, atol=1e-5)
