"""The engine: rows of many callers in one batch, each as if it were alone, and each fault its own request's.

CHAMELEON_REQUESTS=10000 sends as many under load; a run of the suite sends a few.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chameleon_deploy import Adapt, Engine, Generate, Generation, Runtime, Sampling, Stream
from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.errors import (
    ClosedError,
    FactorsError,
    InputError,
    LengthError,
    ModeError,
    NumericError,
    QueueFullError,
    RequestError,
    TokenError,
)
from chameleon_deploy.runtime.decode.schedule import Schedule
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.runtime.engine.batch import ContinuousBatch
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.engine.iteration import Iteration
from chameleon_deploy.runtime.engine.loop import Loop, open_batch
from chameleon_deploy.runtime.engine.stream import deliver
from chameleon_deploy.runtime.engine.submission import form_cohort, prepare
from tests.rows import head_factors, random_rows

REQUESTS = int(os.environ.get("CHAMELEON_REQUESTS", "128"))
LONG = 90  # new tokens: many iterations
HOT = Sampling(temperature=1.3, top_p=0.95, seed=5)


@pytest.fixture
def engine(runtime: Runtime) -> Iterator[Engine]:
    with Engine(runtime, rows=4, prefill_tokens=8) as engine:
        yield engine


class Bench:
    """The engine without its thread: every iteration is asked for."""

    def __init__(self, runtime: Runtime, rows: int = 4, prefill_tokens: int = 8, max_factor_sets: int = 4) -> None:
        self.runtime, self.table = runtime, FactorTable(max_factor_sets)
        batch = open_batch(runtime.backend, self.table, rows, 128, Schedule(prefill_tokens))
        assert isinstance(batch, ContinuousBatch)
        self.loop = Loop(batch, self.table, runtime.tokenizer, runtime.manifest.model.eos_token_id)

    def submit(self, *prompts: list[int], mode: Any = "none", limit: int = LONG, n: int = 1, **more: Any) -> Stream:
        generate = Generate(limit, more.get("sampling", Sampling(ignore_eos=True)), n, more.get("deadline"))
        submission = prepare(self.runtime, prompts, generate, Adapt(mode), 128)
        form_cohort(self.runtime, [submission], 0)
        self.loop.waiting.extend(submission.members)
        return submission.stream

    def iterate(self) -> Iteration:
        tokens, iteration = self.loop.iterate()
        deliver(tokens)
        return iteration

    def run(self) -> None:
        while self.loop:
            self.iterate()


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(1, 512, length).tolist() for length in lengths]


def assert_same(runtime: Runtime, prompt: list[int], found: Generation, sampling: Sampling, **how: Any) -> None:
    """Token for token what the prompt gives alone, up to where the two best are closer than 1e-4."""
    watched = replace(sampling, logprobs=2)
    alone = runtime.generate([prompt], sampling=[watched], **how)[0]
    assert alone.top_logprobs is not None
    for place, token_id in enumerate(alone.token_ids):
        (_, best), (_, second) = alone.top_logprobs[place][:2]
        if place < len(found.token_ids) and found.token_ids[place] == token_id:
            continue
        assert sampling.temperature == 0 and best - second < 1e-4, (found, alone)
        return
    assert (found.token_ids, found.text, found.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


MIXED: list[tuple[Any, Sampling, int]] = [
    ("none", Sampling(), 20), ("centroid", Sampling(), 3), ("request", Sampling(), 12), ("cohort", Sampling(), 9),
    ("centroid", HOT, 15), ("request", Sampling(temperature=0.7, seed=9, repetition_penalty=1.2), 1), ("none", HOT, 11),
    ("centroid", Sampling(stop=("e", "\n")), 20), ("request", Sampling(frequency_penalty=1.0), 7),
]  # fmt: skip


def test_a_request_among_others_is_as_if_alone(runtime: Runtime, engine: Engine) -> None:
    assert engine.batching == "continuous"
    prompts = prompts_of(5, 30, 1, 17, 60, 2, 9, 33, 8)
    streams = [
        engine.submit([prompt], mode=mode, sampling=[sampling], max_new_tokens=limit)
        for prompt, (mode, sampling, limit) in zip(prompts, MIXED, strict=True)
    ]
    for stream, prompt, (mode, sampling, limit) in zip(streams, prompts, MIXED, strict=True):
        assert_same(runtime, prompt, stream.result(60)[0], sampling, mode=mode, max_new_tokens=limit)


def test_in_int8_too(int8_runtime: Runtime) -> None:
    """Chunks, steps and neighbours change no bit that a choice depends on."""
    prompts = prompts_of(5, 30, 1, 17, 60, 2, 9, 33, 65)
    with Engine(int8_runtime, rows=4, prefill_tokens=16) as engine:
        streams = [
            engine.submit([prompt], mode=mode, sampling=[sampling], max_new_tokens=limit)
            for prompt, (mode, sampling, limit) in zip(prompts, MIXED, strict=True)
        ]
        for stream, prompt, (mode, sampling, limit) in zip(streams, prompts, MIXED, strict=True):
            assert_same(int8_runtime, prompt, stream.result(60)[0], sampling, mode=mode, max_new_tokens=limit)


def test_another_rows_factors_are_seen(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FactorTable, "index", lambda self, key: 0)  # every row takes the first set
    with Engine(runtime, rows=4) as engine, pytest.raises(AssertionError):
        streams = [engine.submit([prompt], mode="request", sampling=HOT) for prompt in prompts_of(5, 30, 1, 17)]
        for stream in streams:
            assert_same(runtime, stream.prompts[0], stream.result(60)[0], HOT, mode="request")  # type: ignore[arg-type]


def test_a_submit_of_many_prompts_is_what_generate_makes_of_them(runtime: Runtime, engine: Engine) -> None:
    rows = random_rows(3, 10, 20)
    modes: tuple[Mode, ...] = ("cohort", "request")
    for mode in modes:
        expected = runtime.generate(rows, mode=mode, sampling=HOT)
        stream = engine.submit(rows, mode=mode, sampling=HOT)
        assert stream.result(60) == expected
        assert stream.cluster_ids == [generation.cluster_id for generation in expected]
    tenants = engine.submit(rows, mode="tenant", tenants=["a"] * 10, sampling=HOT)
    assert tenants.result(60) == runtime.generate(rows, mode="tenant", tenants=["a"] * 10, sampling=HOT)


def test_sampled_tokens_depend_on_the_seed_the_prompt_and_the_factors_alone(engine: Engine) -> None:
    prompt, others = prompts_of(11)[0], prompts_of(3, 7, 20, 5, 40, 6)
    alone = engine.submit([prompt], sampling=[HOT], mode="centroid").result(60)[0]
    for _ in range(3):
        before = engine.submit(others[:3], sampling=HOT, mode="request", max_new_tokens=7)
        stream = engine.submit([others[3], prompt], sampling=[Sampling(), HOT], mode="centroid")
        engine.submit(others[4:], sampling=HOT, mode="none").result(60)
        assert stream.result(60)[1] == alone
        before.result(60)


@pytest.mark.parametrize("name", ["runtime", "int8_runtime"])
def test_continuations_draw_from_streams_of_their_own_and_read_the_prompt_once(
    request: pytest.FixtureRequest, name: str
) -> None:
    runtime: Runtime = request.getfixturevalue(name)
    prompt, bench = prompts_of(40)[0], Bench(runtime)
    stream = bench.submit(prompt, mode="centroid", sampling=[HOT], n=4, limit=12)
    iterations = []
    while bench.loop:
        iterations.append(bench.iterate())
    assert sum(iteration.prefilled_tokens for iteration in iterations) in (39, 40)  # the last may be left to a step
    found = stream.result(0)
    assert len({tuple(generation.token_ids) for generation in found}) == 4
    together = runtime.generate([prompt] * 4, sampling=HOT, mode="centroid", max_new_tokens=12)  # streams 0 to 3
    assert [generation.token_ids for generation in found] == [generation.token_ids for generation in together]


def test_more_continuations_than_rows(runtime: Runtime, engine: Engine) -> None:
    prompt = prompts_of(20)[0]
    found = engine.submit([prompt], mode="none", sampling=HOT, n=11).result(60)
    assert found == runtime.generate([prompt] * 11, mode="none", sampling=HOT)


def test_factors_are_bitwise_independent_of_neighbours(runtime: Runtime) -> None:
    prompts, bench = prompts_of(5, 30, 12, 17), Bench(runtime)
    for prompt in prompts:
        bench.submit(prompt, mode="request")
    bench.iterate()
    for member in bench.loop.batch.members:
        expected = runtime.adapt([list(member.row.prompt)], mode="request")
        found = bench.table.set_of(member.key)
        for name, array in expected.factors.sets.tensors.items():
            assert np.asarray(found.sets.tensors[name]).tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize("place", range(4))
def test_a_cancelled_row_is_gone_within_one_iteration(runtime: Runtime, place: int) -> None:
    """Running, being read, or waiting; whoever follows takes the place."""
    bench = Bench(runtime, rows=3)
    streams = [bench.submit(prompt) for prompt in prompts_of(3, 5, 60, 4)]
    for _ in range(3):
        bench.iterate()
    assert [len(bench.loop.batch.members), bench.loop.batch.ready, len(bench.loop.waiting)] == [3, 2, 1]
    streams[place].cancel()
    iteration = bench.iterate()
    assert [row.finish_reason for row in iteration.finished] == ["cancelled"]
    assert streams[place].done
    assert all(member.stream is not streams[place] for member in bench.loop.batch.members + bench.loop.waiting)
    assert len(bench.loop.batch.members) == 3
    bench.run()
    for i, stream in enumerate(streams):
        if i != place:
            assert_same(
                runtime, list(stream.prompts[0]), stream.result(0)[0], Sampling(ignore_eos=True),
                mode="none", max_new_tokens=LONG,
            )  # fmt: skip


def test_a_row_that_cannot_be_cancelled_is_seen(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loop, "_end_expired", lambda self: None)
    with pytest.raises(AssertionError):
        test_a_cancelled_row_is_gone_within_one_iteration(runtime, 0)


def test_a_cancelled_stream_keeps_what_it_has(runtime: Runtime) -> None:
    with Engine(runtime, observe=lambda iteration: time.sleep(0.02)) as engine:  # slower than this thread
        stream = engine.submit(prompts_of(5), max_new_tokens=LONG, mode="none", sampling=Sampling(ignore_eos=True))
        tokens = [next(stream) for _ in range(3)]
        stream.cancel()
        tokens += list(stream)
    assert tokens[-1].generation is not None
    generation = stream.result(0)[0]
    assert generation is tokens[-1].generation
    assert generation.finish_reason == "cancelled"
    assert generation.token_ids == [token.token_id for token in tokens if token.token_id >= 0]
    assert generation.text == "".join(token.text for token in tokens)


def test_a_deadline_ends_a_row_that_runs_and_one_that_waits(engine: Engine) -> None:
    def finish_reasons(deadline: float) -> set[str]:
        sampling = Sampling(ignore_eos=True)
        stream = engine.submit(
            prompts_of(*[5] * 12), max_new_tokens=LONG, mode="none", sampling=sampling, deadline=deadline
        )  # fmt: skip
        return {generation.finish_reason for generation in stream.result(60)}

    assert finish_reasons(1e-6) == {"deadline"}
    assert finish_reasons(600) == {"length"}
    until(lambda: engine.stats().factor_sets == 0)


@pytest.mark.parametrize("jump", [10**9, -(10**9)])
def test_a_clock_that_is_set_ends_no_request(engine: Engine, monkeypatch: pytest.MonkeyPatch, jump: int) -> None:
    clock = itertools.count(time.time(), jump)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    stream = engine.submit(prompts_of(5, 9), max_new_tokens=8, sampling=Sampling(ignore_eos=True), deadline=600)
    assert {generation.finish_reason for generation in stream.result(60)} == {"length"}


def test_the_gap_between_two_tokens_is_one_chunk_and_one_step(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count what runs between two tokens of a row while prompts arrive."""
    bench, calls, gaps = Bench(runtime), list[Any](), list[Any]()
    prefill, step = Slots.prefill, Slots.step

    def counted_prefill(slots: Slots, first: int, rows: Any, factors: Any, num_logits: int = 0) -> Any:
        calls.append(len(rows) * max(map(len, rows)))
        return prefill(slots, first, rows, factors, num_logits)

    def counted_step(slots: Slots, token_ids: Any, factors: Any) -> Any:
        calls.append("step")
        return step(slots, token_ids, factors)

    monkeypatch.setattr(Slots, "prefill", counted_prefill)
    monkeypatch.setattr(Slots, "step", counted_step)
    running = bench.submit(prompts_of(4)[0], limit=60)
    bench.iterate()
    for prompt in prompts_of(100, 3, 90, 50, 1, 20):
        bench.submit(prompt, limit=3)
    while not running.done:
        calls.clear()
        bench.iterate()
        gaps.append(list(calls))
    assert len(gaps) == 59
    for gap in gaps:
        assert gap.count("step") == 1
        assert len(gap) <= 2
        assert all(call == "step" or call <= 8 for call in gap)
    assert sum(call for gap in gaps for call in gap if call != "step") == 99 + 2 + 89 + 49 + 19


@pytest.mark.parametrize("name", ["runtime", "int8_runtime"])
def test_short_prompts_are_read_in_one_call(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is begun, one of a single token, and the continuations of one prompt are not."""
    runtime, calls, prefill = request.getfixturevalue(name), list[list[int]](), Slots.prefill

    def seen(slots: Slots, first: int, rows: Any, factors: Any, num_logits: int = 0) -> Any:
        calls.append(list(map(len, rows)))
        return prefill(slots, first, rows, factors, num_logits)

    monkeypatch.setattr(Slots, "prefill", seen)
    bench = Bench(runtime, rows=9, prefill_tokens=64, max_factor_sets=9)
    left = int(name == "runtime")  # to the step
    streams = [
        bench.submit(prompt, limit=4, mode=mode)
        for prompt, mode in zip(prompts_of(20, 15, 18, 80), ["none", "centroid", "request", "none"], strict=True)
    ]
    streams += [bench.submit(prompts_of(9)[0], limit=4, n=2), bench.submit(prompts_of(3, 1)[1], limit=4)]
    streams.append(bench.submit(prompts_of(5, 7)[0], limit=4))
    bench.run()
    assert [[length + left for length in call] for call in calls if call != [1]] == [
        [20, 15, 18],
        [64 + left],
        [16],
        [9],
        [5],
    ]
    for stream, mode in zip(streams, ["none", "centroid", "request", *["none"] * 4], strict=True):
        for found in stream.result(0):
            assert_same(runtime, list(stream.prompts[0]), found, Sampling(ignore_eos=True), mode=mode, max_new_tokens=4)


def test_nobody_starves(runtime: Runtime) -> None:
    """One factor set at a time, and requests of the resident one keep coming."""
    bench = Bench(runtime, rows=2, max_factor_sets=1)
    first = bench.submit(prompts_of(3)[0], mode="none", limit=10)
    bench.iterate()
    waiting = bench.submit(prompts_of(4)[0], mode="request", limit=2)
    for _ in range(400):
        bench.submit(prompts_of(3)[0], mode="none", limit=10)
        bench.iterate()
        if waiting.done:
            break
    assert waiting.done
    assert first.done


def test_starvation_is_seen(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chameleon_deploy.runtime.decode.schedule.MAX_OVERTAKES", 10**9)
    with pytest.raises(AssertionError):
        test_nobody_starves(runtime)


def test_a_request_of_many_rows_lets_others_in(runtime: Runtime) -> None:
    """Two of 40 rows hold the batch; of a third, the first row to end gives its place."""
    bench = Bench(runtime, rows=4)
    large = [bench.submit(prompts_of(5)[0], limit=6, n=40) for _ in range(2)]
    for _ in range(3):
        bench.iterate()
    small = bench.submit(prompts_of(7)[0], limit=6)
    iterations = 0
    while not small.done:
        bench.iterate()
        iterations += 1
    assert iterations < 3 * 6
    assert not any(stream.done for stream in large)
    bench.run()


def test_a_request_that_lets_nobody_in_is_seen(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_come(queue: Any, running: Any, is_resident: Any, is_full: Any, next_tenant: Any) -> Any:
        return iter(queue)

    monkeypatch.setattr("chameleon_deploy.runtime.engine.loop.admissible", first_come)
    with pytest.raises(AssertionError):
        test_a_request_of_many_rows_lets_others_in(runtime)


def test_a_request_of_many_rows_leaves_room_in_the_queue(runtime: Runtime) -> None:
    with Engine(runtime, rows=2, max_waiting=14) as engine:
        with pytest.raises(InputError, match="9 rows in one submit: this engine takes at most 8"):
            engine.submit(prompts_of(5), n=9)
        kept = [engine.submit(prompts_of(5), n=n, max_new_tokens=LONG, mode="none") for n in (8, 4, 2)]
        with pytest.raises(QueueFullError):
            while True:  # some may have ended by now
                kept.append(engine.submit(prompts_of(5), n=2, max_new_tokens=LONG, mode="none"))
        engine.submit(prompts_of(5), mode="none").result(60)  # a single row has its place
        for stream in kept:
            stream.cancel()


class Incomparable:
    """A tenant whose comparison fails."""

    def __hash__(self) -> int:
        return 5

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")


def test_a_tenant_that_cannot_be_compared_fails_alone(runtime: Runtime) -> None:
    with Engine(runtime, cohort_window_ms=50) as engine:
        first, second = (engine.submit(prompts_of(5), mode="tenant", tenants=[Incomparable()]) for _ in range(2))
        for stream in (first, second):
            found = stream.result(60)[0]
            assert (found.finish_reason, found.error and found.error.code) in (
                ("error", "request_failed"),
                ("length", None),
            )
        assert second.result(0)[0].finish_reason == "error"
        assert engine.submit(prompts_of(5), mode="tenant", tenants=["a"]).result(60)[0].finish_reason != "error"
        assert not engine.closed


def test_a_full_queue_refuses_and_accepts_again(runtime: Runtime) -> None:
    with Engine(runtime, rows=2, max_waiting=3) as engine:
        kept = [engine.submit(prompts_of(5), max_new_tokens=LONG, mode="none") for _ in range(5)]
        with pytest.raises(QueueFullError) as refused:
            while True:  # one may have ended by now
                kept.append(engine.submit(prompts_of(5), max_new_tokens=LONG, mode="none"))
        assert refused.value.code == "queue_full"
        with pytest.raises(InputError, match="6 rows in one submit"):
            engine.submit(prompts_of(*[5] * 6))
        for stream in kept:
            assert stream.result(60)[0].finish_reason in ("length", "stop")
        engine.submit(prompts_of(5), mode="none").result(60)


def test_close_finishes_what_was_accepted(runtime: Runtime) -> None:
    engine = Engine(runtime, rows=2)
    streams = [engine.submit(prompts_of(5), mode="request", sampling=HOT) for _ in range(20)]
    engine.close()
    assert all(stream.result(0)[0].finish_reason in ("length", "stop") for stream in streams)
    assert not engine._thread.is_alive()
    assert engine.stats().running == engine.stats().waiting == engine.stats().factor_sets == 0
    with pytest.raises(ClosedError):
        engine.submit(prompts_of(5))
    engine.close()


def test_close_cancels_what_takes_too_long(runtime: Runtime) -> None:
    engine = Engine(runtime, rows=2)
    sampling = Sampling(ignore_eos=True)
    streams = [engine.submit(prompts_of(5), max_new_tokens=120, mode="none", sampling=sampling) for _ in range(40)]
    engine.close(drain_seconds=0)
    reasons = [stream.result(0)[0].finish_reason for stream in streams]
    assert set(reasons) <= {"length", "cancelled"}
    assert "cancelled" in reasons


def infinite_factors(runtime: Runtime) -> Any:
    """Finite themselves; the logits of their rows are not."""
    model = runtime.manifest.model
    return head_factors(
        np.full((2, model.hidden_size), 1e20, np.float32), np.full((2, model.vocab_size), 3e38, np.float32)
    )


def test_a_row_that_is_not_finite_ends_alone(runtime: Runtime, engine: Engine) -> None:
    good = [engine.submit([prompt], mode="request", sampling=[HOT]) for prompt in prompts_of(5, 9)]
    bad = engine.submit(prompts_of(7), mode="static", factors=infinite_factors(runtime))
    good += [engine.submit([prompt], mode="none", sampling=[HOT]) for prompt in prompts_of(12, 3)]
    generation = bad.result(60)[0]
    assert generation.finish_reason == "error"
    assert isinstance(generation.error, NumericError)
    for stream, mode in zip(good, ("request", "request", "none", "none"), strict=True):
        assert_same(runtime, list(stream.prompts[0]), stream.result(60)[0], HOT, mode=mode)


class FailingSession:
    """The decoder's session, one of whose calls raises."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.fails: Callable[[Any], bool] = lambda binding: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        if self.fails(binding):
            self.fails = lambda binding: False
            raise RuntimeError("out of memory")
        self._session.run_with_iobinding(binding)


@pytest.fixture
def failing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> FailingSession:
    assert isinstance(runtime.decoder, SharedCacheDecoder)
    session = FailingSession(runtime.decoder.session)
    monkeypatch.setattr(runtime.decoder, "session", session)
    return session


def test_a_step_that_raises_ends_the_rows_in_it(runtime: Runtime, failing: FailingSession) -> None:
    bench = Bench(runtime, rows=3)
    inside = [bench.submit(prompt) for prompt in prompts_of(3, 5)]
    for _ in range(4):
        bench.iterate()
    outside = [bench.submit(prompt, limit=5) for prompt in prompts_of(60, 4)]
    bench.iterate()
    failing.fails = lambda binding: True
    prefill = bench.loop.batch.prefill  # its chunk succeeds, its step fails
    bench.loop.batch.prefill = lambda *_: 0  # type: ignore[method-assign]
    bench.iterate()
    bench.loop.batch.prefill = prefill  # type: ignore[method-assign]
    for stream in inside:
        generation = stream.result(0)[0]
        assert generation.finish_reason == "error"
        assert isinstance(generation.error, RequestError)
        assert generation.error.code == "request_failed"
    bench.run()
    for stream in outside:
        assert_same(
            runtime, list(stream.prompts[0]), stream.result(0)[0], Sampling(ignore_eos=True),
            mode="none", max_new_tokens=5,
        )  # fmt: skip


def test_a_chunk_that_raises_ends_its_own_row(runtime: Runtime, failing: FailingSession) -> None:
    bench = Bench(runtime, rows=3)
    running = bench.submit(prompts_of(3)[0], limit=20)
    bench.iterate()
    failing.fails = lambda binding: True
    read = bench.submit(prompts_of(60)[0])
    after = bench.submit(prompts_of(9)[0], limit=5)
    bench.iterate()
    assert isinstance(read.result(0)[0].error, RequestError)
    bench.run()
    assert [stream.result(0)[0].finish_reason for stream in (running, after)] == ["length", "length"]


def test_a_call_that_raises_ends_all_prompts_in_it(runtime: Runtime, failing: FailingSession) -> None:
    bench = Bench(runtime, rows=4, prefill_tokens=32)
    running = bench.submit(prompts_of(3)[0], limit=20)
    bench.iterate()
    failing.fails = lambda binding: True
    read = [bench.submit(prompt) for prompt in prompts_of(9, 9)]
    after = bench.submit(prompts_of(31)[0], limit=5)
    bench.iterate()
    assert [type(stream.result(0)[0].error) for stream in read] == [RequestError] * 2
    bench.run()
    assert [stream.result(0)[0].finish_reason for stream in (running, after)] == ["length", "length"]


def test_factors_that_cannot_be_made_end_their_own_request(
    runtime: Runtime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runtime.backend.generate_factors

    def make(conditioning: Any) -> Any:
        if conditioning[0, 0] == bad:
            raise RuntimeError("out of memory")
        return made(conditioning)

    prompts = prompts_of(5, 9, 7)
    bad = runtime.adapt([prompts[1]], mode="request").embeddings[0, 0]
    monkeypatch.setattr(runtime.backend, "generate_factors", make)
    found = engine.submit(prompts, mode="request").result(60)
    assert [generation.finish_reason == "error" for generation in found] == [False, True, False]
    assert engine.submit([prompts[0]], mode="request").result(60)[0].error is None


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(runtime, rows=2)
    monkeypatch.setattr(ContinuousBatch, "drop", lambda self, gone: 1 / 0)
    generations = engine.submit(prompts_of(5, 5, 5, 5, 5), mode="none").result(60)
    assert len(generations) == 5
    assert isinstance(generations[-1].error, RequestError)
    with pytest.raises(ClosedError):
        engine.submit(prompts_of(5))
    engine.close()


def test_a_cohort_window_joins_callers_and_says_so(runtime: Runtime) -> None:
    rows = random_rows(4, 4, 20)
    expected = runtime.generate(rows, mode="cohort", sampling=[HOT] * 4)
    with Engine(runtime, rows=4, cohort_window_ms=300) as engine:
        streams = [engine.submit([row], mode="cohort", sampling=[HOT]) for row in rows]
        alone = engine.submit(rows[:1], mode="centroid", sampling=[HOT])
        assert [stream.result(60)[0] for stream in streams] == expected
        assert len({stream.cohort for stream in streams}) == 1
        assert streams[0].cohort is not None
        assert streams[0].cohort.size == 4
        assert alone.cohort is None
        tenants = ["a", "b", 1, True]
        four = [engine.submit(rows[:2], mode="tenant", tenants=[tenant] * 2, sampling=[HOT] * 2) for tenant in tenants]
        together = runtime.generate(rows[:2], mode="cohort", sampling=[HOT] * 2)
        assert [stream.result(60) for stream in four] == [together] * 4
        assert [stream.cohort.size for stream in four if stream.cohort] == [2] * 4


def test_a_closing_engine_does_not_wait_for_more_of_a_cohort(runtime: Runtime) -> None:
    prompts = prompts_of(5, 9)
    expected = runtime.generate(prompts, mode="cohort", max_new_tokens=4)
    engine = Engine(runtime, rows=2, cohort_window_ms=600_000)
    streams = [engine.submit([prompt], mode="cohort", max_new_tokens=4) for prompt in prompts]
    began = time.monotonic()
    engine.close(drain_seconds=300)
    assert time.monotonic() - began < 60
    assert [stream.result(0)[0] for stream in streams] == expected


def test_an_engine_is_closed_at_the_interpreters_exit(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit = list[tuple[Any, ...]]()
    module = SimpleNamespace(register=lambda *call: at_exit.append(call), unregister=lambda call: at_exit.clear())
    monkeypatch.setattr("chameleon_deploy.runtime.engine.engine.atexit", module)
    engine = Engine(runtime, rows=1)
    stream = engine.submit([[5]], max_new_tokens=100, sampling=Sampling(ignore_eos=True))
    ((close, *arguments),) = at_exit
    close(*arguments)  # without waiting for the row
    assert engine.closed and stream.result(0)[0].finish_reason == "cancelled"
    assert not at_exit


def test_an_idle_engine_takes_no_processor_time(runtime: Runtime) -> None:
    with Engine(runtime, rows=1, cohort_window_ms=60_000) as engine:
        assert engine._window == 60
        engine.submit([[5]], max_new_tokens=1, mode="none").result(60)
        start = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - start < 0.25


def test_only_the_first_tokens_adapt(runtime: Runtime, engine: Engine) -> None:
    prompt = prompts_of(40)[0]
    stream = engine.submit([prompt], mode="request", adapt_tokens=3)
    assert stream.cluster_ids == runtime.adapt([prompt[:3]]).cluster_ids.tolist()
    stream.result(60)


def test_what_the_engine_says_of_itself(runtime: Runtime) -> None:
    iterations: list[Iteration] = []
    with Engine(runtime, rows=2, prefill_tokens=8, observe=iterations.append) as engine:
        engine.submit(prompts_of(20, 5, 3), mode="centroid", max_new_tokens=4, n=2).result(60)
        assert engine.stats().cache_capacity == 2 * 128
    finished = [row for iteration in iterations for row in iteration.finished]
    assert len(finished) == 6
    assert {(row.mode, row.finish_reason, row.new_tokens) for row in finished} == {("centroid", "length", 4)}
    assert sum(len(iteration.first_tokens) for iteration in iterations) == 6
    assert sum(len(iteration.later_tokens) for iteration in iterations) == 18
    assert sum(len(iteration.queued) for iteration in iterations) == 6
    assert sum(iteration.rows for iteration in iterations) == 24
    assert max(iteration.rows for iteration in iterations) == 2
    assert all((iteration.step > 0) == (iteration.rows > 0) for iteration in iterations)


def test_an_observer_that_raises_ends_nobody(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    def observe(iteration: Iteration) -> None:
        raise RuntimeError("no metrics today")

    with Engine(runtime, observe=observe) as engine:
        assert engine.submit(prompts_of(5), mode="none").result(60)[0].error is None
    assert "no metrics today" in caplog.text


def test_coroutines_read_streams(runtime: Runtime, engine: Engine) -> None:
    prompts = prompts_of(*range(1, 21))

    async def read(prompt: list[int]) -> list[int]:
        stream = engine.submit([prompt], mode="centroid", sampling=[HOT])
        token_ids = [token.token_id async for token in stream]
        assert (await stream)[0].token_ids == token_ids
        return token_ids

    async def cancelled(prompt: list[int]) -> Generation:
        stream = engine.submit([prompt], mode="none", max_new_tokens=120, sampling=Sampling(ignore_eos=True))
        async for _ in stream:
            stream.cancel()
        return (await stream)[0]

    async def all_of_them() -> tuple[list[list[int]], Generation, list[Generation]]:
        reading = asyncio.gather(*map(read, prompts))
        ended = await cancelled(prompts[3])
        return await reading, ended, await engine.submit(prompts[:3], mode="none")

    found, ended, awaited = asyncio.run(all_of_them())
    expected = [runtime.generate([prompt], mode="centroid", sampling=[HOT])[0].token_ids for prompt in prompts]
    assert found == expected
    assert ended.finish_reason == "cancelled"
    assert awaited == runtime.generate(prompts[:3], mode="none")
    # A reader whose loop is gone harms nobody.
    abandoned = engine.submit(prompts[:1], mode="none", max_new_tokens=LONG)
    asyncio.run(asyncio.wait_for(abandoned.__anext__(), 60))
    assert abandoned.result(60)


def test_a_decoder_without_slots_runs_static_batches(portable: Runtime) -> None:
    with Engine(portable, rows=3) as engine:
        assert engine.batching == "static"
        prompts = prompts_of(5, 30, 1, 17, 60, 2, 9)
        streams = [engine.submit([prompt], mode="request", sampling=[HOT]) for prompt in prompts]
        cancelled = engine.submit(prompts_of(9), mode="none", max_new_tokens=LONG, sampling=Sampling(ignore_eos=True))
        next(cancelled)
        cancelled.cancel()
        for stream, prompt in zip(streams, prompts, strict=True):
            assert_same(portable, prompt, stream.result(60)[0], HOT, mode="request")
        assert cancelled.result(60)[0].finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("error", "prompts", "arguments"),
    [
        (InputError, [], {}),
        (InputError, [[]], {}),
        (InputError, "text", {}),
        (TokenError, [[512]], {}),
        (LengthError, [[1] * 41], {}),
        (ModeError, [[1]], {"mode": "nonsense"}),
        (ModeError, [[1]], {"mode": "static"}),
        (FactorsError, [[1]], {"mode": "static", "factors": (1, 2)}),
        (InputError, [[1]], {"mode": "tenant"}),
        (InputError, [[1]], {"mode": "tenant", "tenants": "a"}),
        (InputError, [[1]], {"mode": "tenant", "tenants": [("a", {})]}),
        (InputError, [[1]], {"mode": "none", "tenants": ["a"]}),
        (InputError, [[1]], {"n": 0}),
        (InputError, [[1]], {"max_new_tokens": 0}),
        (InputError, [[1]], {"max_new_tokens": [1, 2]}),
        (InputError, [[1]], {"sampling": [Sampling()] * 2}),
        (InputError, [[1]], {"deadline": 0}),
        (InputError, [[1]], {"deadline": float("nan")}),
        (InputError, [[1]], {"adapt_tokens": 0}),
    ],
)
def test_bad_arguments_are_refused_at_once(
    runtime: Runtime, error: type[Exception], prompts: Any, arguments: dict[str, Any]
) -> None:
    with Engine(runtime, rows=2, capacity=40) as engine:
        with pytest.raises(error):
            engine.submit(prompts, **arguments)
        assert engine.stats().waiting == 0
        assert len(engine.submit([[1] * 40], mode="none").result(60)[0].token_ids) == 1


@pytest.mark.parametrize("name", ["rows", "prefill_tokens", "max_factor_sets"])
def test_bad_settings_are_refused(runtime: Runtime, name: str) -> None:
    with pytest.raises(InputError, match=name):
        Engine(runtime, **{name: -1})  # type: ignore[arg-type]


def test_keys_and_values_fit_into_half_of_the_free_memory(
    runtime: Runtime, portable: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chameleon_deploy.runtime.engine import engine as module

    assert isinstance(runtime.decoder, SharedCacheDecoder)
    model, token_bytes = runtime.manifest.model, runtime.decoder.token_bytes
    assert token_bytes == 2 * model.num_layers * model.num_key_value_heads * model.head_dim * 4

    def capacity(free: int | None, on: Runtime = runtime, **settings: Any) -> int:
        monkeypatch.setattr(module, "free_memory", lambda: free)
        with Engine(on, prefix_cache_bytes=0, **settings) as engine:
            assert engine.stats().cache_capacity == engine.rows * engine.capacity
            return engine.capacity

    assert capacity(None) == capacity(2**40) == model.max_positions
    forty = 2 * 4 * 40 * token_bytes  # half of it holds 40 tokens in each of four rows
    assert capacity(forty, rows=4) == 40
    assert capacity(forty - 1, rows=4) == 39
    assert capacity(forty, rows=4, capacity=80) == 80  # all of it, where the caller says so
    assert capacity(1, portable) == model.max_positions  # which takes memory as texts grow
    refused: list[tuple[dict[str, Any], str]] = [({"rows": 4, "capacity": 81}, "capacity"), ({"rows": 11}, "rows")]
    for settings, name in refused:
        with pytest.raises(InputError, match="GB of memory are free: pass fewer rows") as error:
            capacity(forty, **settings)
        assert error.value.argument == name
    monkeypatch.setattr(module, "free_memory", lambda: forty)
    with Engine(runtime, rows=4) as engine, pytest.raises(LengthError, match="a row of this engine holds 40"):
        engine.submit([[1] * 41])


def test_64_callers_at_once(runtime: Runtime) -> None:
    """Mixed modes, lengths, sampling, n and stops; a tenth is cancelled. All others are as if alone."""
    rng = random.Random(7)
    prompts = prompts_of(*(rng.randint(1, 60) for _ in range(24)))
    kinds = [(prompt, *rng.choice(MIXED), rng.choice((1, 1, 1, 2, 3))) for prompt in prompts]
    # The continuations of one prompt are the rows of a batch of it, in every mode: their embeddings are equal.
    expected = [
        runtime.generate([prompt] * n, mode=mode, sampling=sampling, max_new_tokens=limit)
        for prompt, mode, sampling, limit, n in kinds
    ]
    threads = threading.active_count()

    def call(number: int) -> bool:
        rng = random.Random(number)
        kind = rng.randrange(len(kinds))
        prompt, mode, sampling, limit, n = kinds[kind]
        stream = engine.submit([prompt], mode=mode, sampling=sampling, max_new_tokens=limit, n=n)
        if rng.random() < 0.1:
            if rng.random() < 0.5:
                next(stream)
            stream.cancel()
            stream.result(300)
            return True
        if rng.random() < 0.5:
            for _ in stream:
                pass
        return same(stream.result(300), expected[kind])

    def same(found: list[Generation], alone: list[Generation]) -> bool:
        return [g.token_ids for g in found] == [g.token_ids for g in alone] and [g.text for g in found] == [
            g.text for g in alone
        ]

    with Engine(runtime, rows=8, prefill_tokens=16, max_factor_sets=5) as engine, ThreadPoolExecutor(64) as pool:
        assert all(pool.map(call, range(REQUESTS)))
        until(lambda: engine.stats().factor_sets == 0)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.cached_tokens) == (0, 0, 0)
    assert threading.active_count() == threads
