"""Tenants share an engine: rows by weight, prompts in turns, limits of each; counted in steps and tokens, not timed."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import numpy as np
import pytest

from chameleon_deploy import Adapt, Engine, Generate, Runtime, Sampling, Stream, Tenant
from chameleon_deploy.errors import InputError, QueueFullError, RateLimitError
from chameleon_deploy.runtime.decode.schedule import CALL_TOKENS, Schedule, short_chunk
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.engine.iteration import FinishedRow, Iteration
from chameleon_deploy.runtime.engine.loop import Loop, open_batch
from chameleon_deploy.runtime.engine.stream import deliver
from chameleon_deploy.runtime.engine.submission import form_cohort, prepare
from chameleon_deploy.runtime.engine.tenants import SHORT_CALLS, Accounts, Crowding, Shares, may_begin

A, B, C = Tenant("a"), Tenant("b"), Tenant("c")
ENDLESS = Sampling(ignore_eos=True)
CHUNK = 64
STEP_ROW_TOKENS = 2  # what a row of a step costs, in prompt tokens


class Bench:
    """The engine without its thread. `cost` is the time of what it has done in prompt tokens, as schedule.py has it."""

    def __init__(self, runtime: Runtime, rows: int = 5, prefill_tokens: int = CHUNK) -> None:
        self.runtime, table = runtime, FactorTable(rows)
        self.batch = cast(Any, open_batch(runtime.backend, table, rows, 128, Schedule(prefill_tokens)))
        self.loop = Loop(self.batch, table, runtime.tokenizer, runtime.manifest.model.eos_token_id)
        self.cost, self.chunks, self.row_steps = 0, list[tuple[str, int]](), Counter[str]()
        self._prefill, self.batch._slots.prefill = self.batch._slots.prefill, self.prefill

    def prefill(self, first: int, rows: Any, *more: Any) -> Any:
        self.chunks.append((self.batch.members[first].tenant.name, sum(map(len, rows))))
        return self._prefill(first, rows, *more)

    def submit(self, tenant: Tenant, length: int, limit: int = 2, number: int = 0) -> Stream:
        prompt = np.random.default_rng([length, number]).integers(1, 512, length).tolist()
        submission = prepare(self.runtime, [prompt], Generate(limit, ENDLESS), Adapt("none"), 128, tenant)
        form_cohort(self.runtime, [submission], 0)
        self.loop.waiting.extend(submission.members)
        return submission.stream

    def iterate(self) -> Iteration:
        tokens, iteration = self.loop.iterate()
        deliver(tokens)
        if iteration.prefilled_tokens:
            self.cost += CALL_TOKENS + iteration.prefilled_tokens
        if iteration.rows:
            self.cost += CALL_TOKENS + STEP_ROW_TOKENS * iteration.rows
            self.row_steps.update(member.tenant.name for member in self.batch.members[: iteration.rows])
        return iteration

    def until_first_token(self, stream: Stream) -> int:
        """Return the cost up to a stream's first token."""
        begun = self.cost
        while stream._tokens.empty():
            self.iterate()
        return self.cost - begun


@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("at", range(0, 12, 3))
def test_a_flood_of_long_prompts_delays_another_tenants_first_token_by_as_much_as_it_takes(
    runtime: Runtime, length: int, at: int
) -> None:
    """At most twice what it takes alone and one chunk, whenever it comes."""
    alone, flooded = Bench(runtime), Bench(runtime)
    for number in range(20):
        flooded.submit(A, 120, 4, number)
    for _ in range(at):
        flooded.iterate()
    bound = 2 * alone.until_first_token(alone.submit(B, length)) + CALL_TOKENS + CHUNK
    assert flooded.until_first_token(flooded.submit(B, length)) <= bound
    assert flooded.loop.waiting, "the flood was over"


@pytest.mark.parametrize("pause", [0, 4])
def test_a_tenant_that_asks_again_waits_for_short_chunks(runtime: Runtime, pause: int) -> None:
    """It comes back when a chunk has begun: so it waits for that one, and reads its own."""
    alone, flooded = Bench(runtime), Bench(runtime)
    for number in range(40):
        flooded.submit(A, 120, 4, number)
    own = alone.until_first_token(alone.submit(B, 20))
    flooded.until_first_token(flooded.submit(B, 20, 1))
    for number in range(4):
        for _ in range(pause):
            flooded.iterate()
        begun = flooded.cost
        flooded.iterate()
        short = flooded.cost - begun
        flooded.until_first_token(flooded.submit(B, 20, 1, number))
        name, tokens = flooded.chunks[-2]
        assert name == "a" and tokens <= short_chunk(CHUNK)
        assert flooded.cost - begun <= short + 2 * own
    assert flooded.loop.waiting, "the flood was over"


def test_without_tenants_a_flood_delays_others(runtime: Runtime) -> None:
    """The fault that the test above would see."""
    alone, flooded = Bench(runtime), Bench(runtime)
    for number in range(20):
        flooded.submit(Tenant(), 120, 4, number)
    flooded.iterate()
    bound = 2 * alone.until_first_token(alone.submit(Tenant(), 20)) + CALL_TOKENS + CHUNK
    assert flooded.until_first_token(flooded.submit(Tenant(), 20)) > 3 * bound


def test_chunks_shrink_while_another_tenant_waits(runtime: Runtime) -> None:
    bench = Bench(runtime)
    for number in range(4):
        bench.submit(A, 120, number=number)
    bench.iterate()
    bench.submit(B, 120)
    for _ in range(4):
        bench.iterate()
    short = ("a", short_chunk(CHUNK))
    assert bench.chunks == [("a", CHUNK), ("b", CHUNK), short, ("b", 120 - 1 - CHUNK), short]


def test_rows_that_take_turns_are_as_if_they_were_alone(runtime: Runtime) -> None:
    """Prompts that are begun change places; every row still has its own keys and values."""
    bench, streams = Bench(runtime, prefill_tokens=16), []
    for number, (tenant, length) in enumerate([(A, 90), (B, 70), (A, 33), (C, 50), (B, 5), (A, 90), (C, 17)]):
        streams.append(bench.submit(tenant, length, 6, number))
        bench.iterate()
    while bench.loop:
        bench.iterate()
    for stream in streams:
        (alone,) = runtime.generate([stream.prompts[0]], Generate(6, ENDLESS), Adapt("none"))
        assert stream.result(0)[0].token_ids == alone.token_ids
    assert len({name for name, _ in bench.chunks}) == 3


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2)])
def test_tenants_share_rows_by_weight(runtime: Runtime, weights: tuple[int, int]) -> None:
    bench = Bench(runtime, rows=8)
    tenants = [Tenant(name, weight) for name, weight in zip("ab", weights, strict=True)]
    for number in range(150):
        for tenant in tenants:
            bench.submit(tenant, 6, 10, number)
    for _ in range(20):  # beyond the first rounds
        bench.iterate()
    bench.row_steps.clear()
    for _ in range(150):
        bench.iterate()
    assert {member.tenant.name for member in bench.loop.waiting} == {"a", "b"}
    assert bench.row_steps["a"] / bench.row_steps["b"] == pytest.approx(weights[0] / weights[1], rel=0.15)


def test_limits_of_rows_and_the_last_place(runtime: Runtime) -> None:
    bench = Bench(runtime, rows=4)
    for number in range(6):
        bench.submit(Tenant("few", rows=2), 4, 50, number)
    bench.iterate()
    assert [member.tenant.name for member in bench.batch.members] == ["few"] * 2
    for number in range(3):
        bench.submit(A, 4, 50, number)
    bench.iterate()
    assert [member.tenant.name for member in bench.batch.members] == ["few", "few", "a"], "the last is kept for others"
    bench.submit(B, 4, 50)
    bench.iterate()
    assert [member.tenant.name for member in bench.batch.members].count("b") == 1


def test_who_may_begin() -> None:
    assert may_begin(Tenant(), running=3, free=1, places=4)
    assert may_begin(A, 0, 1, 4) and not may_begin(A, 1, 1, 4) and may_begin(A, 1, 2, 4)
    assert may_begin(A, 0, 1, 1) and not may_begin(A, 1, 1, 2)


def test_who_reads_short_chunks() -> None:
    heavy = Tenant("h", weight=4)
    assert Crowding().names([A, A, B], [A, B]) == {"a"}
    assert Crowding().names([A, A, B], [A]) == set()
    assert Crowding().names([A, B], [A, B]) == set()
    assert Crowding().names([heavy] * 3 + [B], [heavy, B]) == {"b"}


def test_chunks_stay_short_for_some_calls_after_another_tenant_has_waited() -> None:
    crowding = Crowding()
    crowding.names([A, A, B], [A, B])
    assert [crowding.names([A, A], [A, A]) for _ in range(SHORT_CALLS)] == [{"a"}] * (SHORT_CALLS - 1) + [set()]
    crowding.names([A, B], [A, B])
    assert crowding.names([A], [A]) == set(), "one row each is no crowd"


def test_debts_are_paid_in_rounds_and_nothing_is_owed_to_nobody() -> None:
    shares, both = Shares(), {"a", "b"}
    shares.keep(["a", "b"])
    assert shares.turn([A, B], [A, B]) is A
    shares.charge(A, 1000, {"a"})
    assert shares.turn([A, B], [A, B]) is A, "tokens were charged while nobody else waited"
    shares.charge(A, 1000, both)
    served = Counter[str]()
    for _ in range(20):
        tenant = shares.turn([A, B], [A, B])
        served[tenant.name] += 100
        shares.charge(tenant, 100, both)
    assert served["b"] - served["a"] == pytest.approx(1000, abs=200)
    shares.keep(["b"])
    shares.keep(["b", "a"])
    assert shares._deficits["a"] == 0


def test_rounds_are_as_many_as_give_one_tenant_a_turn() -> None:
    shares, both, heavy = Shares(), {"a", "h"}, Tenant("h", weight=4)
    shares.keep(["a", "h"])
    assert shares.turn([A, heavy], [A, heavy]) is A
    assert shares._deficits == {"a": 16, "h": 64}
    shares.charge(A, 15, both)
    shares.charge(heavy, 63, both)
    assert shares.turn([A, heavy], [A, heavy]) is A, "its turn lasts while a token is left"
    assert shares._deficits == {"a": 1, "h": 1}
    shares.charge(A, 1, both)
    assert shares.turn([A, heavy], [A, heavy]) is heavy, "none is left"
    shares.charge(A, 160, both)
    shares.charge(heavy, 129, both)
    assert shares.turn([A, heavy], [A, heavy]) is heavy
    assert shares._deficits == {"h": -128 + 3 * 64, "a": -160 + 3 * 16}


def finished(tenant: str, new_tokens: int) -> FinishedRow:
    return FinishedRow("none", 0, "length", 1, new_tokens, 1.0, tenant=tenant)


def test_tokens_of_a_minute() -> None:
    now = 0.0
    accounts, limited = Accounts(4, 100, lambda: now), Tenant("a", tokens_per_minute=60)
    accounts.begin(limited, 1, 50)
    accounts.begin(limited, 1, 20)  # beyond the limit, since a token was left
    with pytest.raises(RateLimitError) as caught:
        accounts.begin(limited, 1, 1)
    assert caught.value.retry_seconds == 11
    accounts.end(finished("a", 30))
    now = 41.0  # the new tokens are owed, too: 41 - 40 is one token
    accounts.begin(limited, 1, 1)
    with pytest.raises(RateLimitError):
        accounts.begin(limited, 1, 1)
    accounts.begin(B, 1, 10_000)
    for name in ("a", "a", "b"):
        accounts.end(finished(name, 0))
    now = 200.0
    accounts.begin(C, 1, 1)
    assert set(accounts._accounts) == {"c"}, "tenants that left are remembered for ever"
    assert not accounts._limits


@pytest.mark.parametrize(("seconds", "is_known"), [(9.9, True), (10, False)])
def test_a_tenant_is_forgotten_when_its_tokens_are_back(seconds: float, is_known: bool) -> None:
    now = 5.0
    accounts = Accounts(4, 100, lambda: now)
    accounts.begin(Tenant("a", tokens_per_minute=60), 1, 10)
    accounts.end(finished("a", 0))
    now += seconds
    accounts.begin(B, 1, 1)
    assert ("a" in accounts._accounts) == is_known


def test_a_tenant_has_one_place_of_a_queue_that_others_fill() -> None:
    accounts = Accounts(1, 1)
    accounts.begin(A, 1, 1)
    accounts.begin(B, 1, 1)
    with pytest.raises(QueueFullError):
        accounts.begin(B, 1, 1)


def test_a_tenants_waiting_rows_are_counted_beside_those_that_may_run() -> None:
    for rows in (1, None):
        accounts = Accounts(2, 14)
        tenant = Tenant("a", rows=rows, max_waiting=2)
        accounts.begin(tenant, (rows or 2) + 2, 1)
        with pytest.raises(QueueFullError, match="'a'"):
            accounts.begin(tenant, 1, 1)


def test_no_tenant_fills_the_queue() -> None:
    accounts = Accounts(2, 14)
    for _ in range(8):
        accounts.begin(A, 1, 1)
    with pytest.raises(QueueFullError):
        accounts.begin(A, 1, 1)
    accounts.begin(B, 4, 1)
    with pytest.raises(QueueFullError):
        accounts.begin(B, 1, 1)
    accounts.begin(Tenant(), 1, 1)
    with pytest.raises(QueueFullError):
        accounts.begin(Tenant("c", rows=1, max_waiting=1), 3, 1)


def test_an_engine_holds_tenants_to_their_limits(runtime: Runtime) -> None:
    limited = Tenant("a", max_waiting=0, tokens_per_minute=1000)
    with Engine(runtime, rows=2, max_waiting=20) as engine:
        streams = [engine.submit([[1, 2, 3]], tenant=limited, max_new_tokens=60, mode="none") for _ in range(2)]
        with pytest.raises(QueueFullError, match="'a'"):
            engine.submit([[1]], tenant=limited)
        assert engine.submit([[1]], tenant=B, max_new_tokens=2, mode="none").result(60)
        for stream in streams:
            stream.result(60)
        engine.submit([[1] * 100] * 10, tenant=Tenant("t", tokens_per_minute=900), max_new_tokens=1).result(60)
        with pytest.raises(RateLimitError, match="900 tokens per minute"):
            engine.submit([[1]], tenant=Tenant("t", tokens_per_minute=900))
        assert [row.tenant for row in streams[0].finished] == ["a"]


@pytest.mark.parametrize(
    "fields",
    [{"weight": 0}, {"weight": 1001}, {"rows": 0}, {"max_waiting": -1}, {"weight": 1.5}, {"rows": 2**40 + 1},
     {"tokens_per_minute": 0}],
)  # fmt: skip
def test_a_tenant_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Tenant("a", **fields)
    assert Tenant("a", rows=2**40, tokens_per_minute=1).weight == 1
