"""The limits of an engine, what they take of the free memory, and how long its thread sleeps. Without a decoder."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.decode.prefix_cache import PrefixCacheStats
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.engine import engine as module
from chameleon_deploy.runtime.engine.engine import Engine, EngineOptions
from chameleon_deploy.runtime.engine.iteration import Iteration
from chameleon_deploy.runtime.inputs import MAX_ROWS

POSITIONS, TOKEN_BYTES = 1000, 100


class Decoder(SharedCacheDecoder):
    def __init__(self) -> None: ...

    @property
    def token_bytes(self) -> int:
        return TOKEN_BYTES

    def prefix_cache(self, bundle_digest: str, max_bytes: int) -> Any:
        return bundle_digest, max_bytes


def runtime(decoder: Any = None, positions: int = POSITIONS) -> Any:
    """Return what an engine asks of a runtime: by default with a decoder of the CPU."""
    return SimpleNamespace(
        decoder=Decoder() if decoder is None else decoder,
        provider="device",
        bundle=SimpleNamespace(digest="sha"),
        manifest=SimpleNamespace(model=SimpleNamespace(max_positions=positions)),
    )


def capacity(monkeypatch: pytest.MonkeyPatch, free: int | None, of: Any = None, **options: Any) -> int:
    monkeypatch.setattr(module, "free_memory", lambda: free)
    return module._capacity(of or runtime(), EngineOptions(rows=2, **options))


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("rows", 1, MAX_ROWS), ("max_waiting", 0, None), ("prefill_tokens", 8, None), ("max_factor_sets", 1, None),
     ("cohort_window_ms", 0, None), ("capacity", 1, None), ("prefix_cache_bytes", 0, None)],
)  # fmt: skip
def test_the_ends_of_options(name: str, least: int, most: int | None) -> None:
    for value in (least, most or 10**6):
        options: Any = {name: value}
        assert getattr(EngineOptions(**options), name) == value
    for value in (least - 1, *([most + 1] if most else [])):
        options = {name: value}
        with pytest.raises(InputError) as refused:
            EngineOptions(**options)
        assert refused.value.argument == name


def test_the_defaults() -> None:
    assert EngineOptions() == EngineOptions(8, 256, 256, None, 0, None, None)


def test_a_row_holds_what_half_of_the_free_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    of_two = 2 * TOKEN_BYTES
    assert capacity(monkeypatch, 2 * of_two * POSITIONS) == POSITIONS
    assert capacity(monkeypatch, 2 * of_two * 500) == 500
    assert capacity(monkeypatch, 2 * of_two * 500 - 1) == 499
    assert capacity(monkeypatch, 2 * of_two * 16) == 16
    with pytest.raises(InputError, match=r"2 rows of 16 tokens take 0\.0 GB, .*: pass fewer rows") as refused:
        capacity(monkeypatch, 2 * of_two * 16 - 1)
    assert refused.value.argument == "rows"
    assert capacity(monkeypatch, 2 * of_two * 9, runtime(positions=9)) == 9


def test_a_capacity_that_is_given_may_take_all_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capacity(monkeypatch, 2 * TOKEN_BYTES * 300, capacity=300) == 300
    assert capacity(monkeypatch, 2 * TOKEN_BYTES * 5, capacity=5) == 5
    with pytest.raises(InputError, match="2 rows of 300 tokens take") as refused:
        capacity(monkeypatch, 2 * TOKEN_BYTES * 300 - 1, capacity=300)
    assert refused.value.argument == "capacity"
    assert capacity(monkeypatch, 10**9, capacity=POSITIONS + 1) == POSITIONS


def test_memory_that_is_not_known_or_a_devices_own_bounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capacity(monkeypatch, None) == POSITIONS
    assert capacity(monkeypatch, 1, runtime(object())) == POSITIONS


def test_the_prefix_cache_takes_a_tenth_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def cache(free: int | None, of: Any = None, **options: Any) -> Any:
        monkeypatch.setattr(module, "free_memory", lambda: free)
        return module._prefix_cache(of or runtime(), EngineOptions(**options))

    assert cache(1009) == ("sha", 100)
    assert cache(None) is None
    assert cache(1009, prefix_cache_bytes=0) is None
    assert cache(1009, prefix_cache_bytes=7) == ("sha", 7)
    assert cache(1009, runtime(object())) is cache(1009, runtime(object()), prefix_cache_bytes=0) is None
    with pytest.raises(InputError, match="the decoder of provider 'device' has no prefix cache") as refused:
        cache(1009, runtime(object()), prefix_cache_bytes=1)
    assert refused.value.argument == "prefix_cache_bytes"


def idle(**state: Any) -> Engine:
    """Return an engine without a thread, which has nothing to do."""
    engine: Any = object.__new__(Engine)
    before: dict[str, Any] = {"_loop": [], "_closing": False, "_present": 0, "_open_cohorts": {}, "_prefixes": None}
    engine.__dict__ |= before | {"_lock": threading.Lock()} | state
    made: Engine = engine
    return made


def test_the_thread_sleeps_until_something_comes_or_a_cohort_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    assert idle()._idle_seconds() is None
    assert idle(_closing=True)._idle_seconds() == 0
    assert idle(_loop=["row"])._idle_seconds() == 0
    cohorts: dict[str, tuple[float, list[Any]]] = {"a": (103.0, []), "b": (102.5, [])}
    assert idle(_open_cohorts=cohorts)._idle_seconds() == 2.5
    assert idle(_open_cohorts=cohorts, _present=1, _closing=True)._idle_seconds() == 0  # a cohort closes at once
    assert idle(_open_cohorts={"a": (99.0, [])})._idle_seconds() == 0


def test_a_cohort_closes_at_the_end_of_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    formed, loop = list[Any](), SimpleNamespace(waiting=[], refuse=lambda *_: None)
    monkeypatch.setattr(
        module, "form_cohort", lambda runtime, submissions, number: formed.append((submissions, number))
    )
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    one, two, late, now = (SimpleNamespace(members=[name], cohort_key=key) for name, key in (
        ("one", "a"), ("two", "a"), ("late", "b"), ("now", None)))  # fmt: skip
    engine: Any = idle(_window=0.5, _loop=loop, runtime=None, _cohort_ids=iter([7, 8]))
    for submission in (None, one, now):
        engine._take(submission)
    assert loop.waiting == ["now"]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 100.25))
    engine._take(two)
    engine._take(late)
    engine._close_cohorts()
    assert not formed
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 100.5))
    engine._close_cohorts()
    assert formed == [([one, two], 7)]
    assert loop.waiting == ["now", "one", "two"]
    assert list(engine._open_cohorts) == ["b"]
    without = idle(_window=0, _loop=loop)
    without._take(late)  # type: ignore[arg-type]
    assert loop.waiting[-1] == "late" and not without._open_cohorts


def test_a_cohort_that_cannot_be_formed_ends_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, error = list[Any](), ValueError("not comparable")

    def form_cohort(*_: Any) -> None:
        raise error

    monkeypatch.setattr(module, "form_cohort", form_cohort)
    loop = SimpleNamespace(waiting=[], refuse=lambda members, error: refused.append((members, error)))
    cohort = (0.0, [SimpleNamespace(members=["one"]), SimpleNamespace(members=["two"])])
    engine = idle(_loop=loop, runtime=None, _cohort_ids=iter([0]), _open_cohorts={"a": cohort})
    engine._close_cohorts()
    assert refused == [(["one", "two"], error)] and not loop.waiting and not engine._open_cohorts


def test_a_fault_ends_what_waits_in_the_queue_and_in_cohorts() -> None:
    failed, commands = list[Any](), SimpleQueue[Any]()
    for submission in (SimpleNamespace(members=["one"]), None, SimpleNamespace(members=["two"])):
        commands.put(submission)

    def fail(error: Exception) -> tuple[dict[Any, Any], Iteration]:
        failed.append(error)
        return {}, Iteration()

    loop = SimpleNamespace(waiting=[], fail=fail)
    cohorts = {"a": (0.0, [SimpleNamespace(members=["three"]), SimpleNamespace(members=["four"])])}
    engine = idle(_loop=loop, _window=0, _commands=commands, _open_cohorts=cohorts, _observe=None)
    engine._fail(cause := ValueError("planted"))
    assert loop.waiting == ["one", "two", "three", "four"]
    assert engine.closed and failed[0].__cause__ is cause


def test_without_a_prefix_cache_there_is_nothing_to_tell_or_to_forget() -> None:
    engine = idle()
    assert engine.prefix_cache_stats("a") == PrefixCacheStats()
    engine.clear_prefix_cache("a")
    forgotten = list[str]()
    engine = idle(_prefixes=SimpleNamespace(stats=lambda salt: f"of {salt}", clear=forgotten.append))
    stats: Any = engine.prefix_cache_stats("a")
    assert stats == "of a"
    engine.clear_prefix_cache("b")
    assert forgotten == ["b"]


def test_what_is_queued_is_counted_beside_what_runs() -> None:
    batch = SimpleNamespace(members=[1, 2], cached_tokens=9)
    loop = SimpleNamespace(table=[1])
    engine: Any = idle(_batch=batch, _loop=loop, _present=5, rows=4, capacity=16)
    assert engine.stats() == module.Stats(2, 3, 4, 9, 64, 1)
    engine._present = 1  # rows that ended in this iteration are in the batch until the next
    assert engine.stats().waiting == 0


@pytest.mark.parametrize(("n", "argument"), [([], "prompts"), ([1], "prompts"), ([2], "n")])
def test_a_submit_of_too_many_rows_names_what_makes_them(n: list[int], argument: str) -> None:
    engine: Any = idle(rows=4, max_waiting=4)
    with pytest.raises(InputError, match="5 rows in one submit: this engine takes at most 4") as refused:
        engine._queue(SimpleNamespace(members=[0] * 5), None, *n)
    assert refused.value.argument == argument


def test_nothing_is_accepted_without_a_name_of_an_argument() -> None:
    engine: Any = idle()
    for call in (engine.submit, engine.submit_scores, engine.submit_chat):
        with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
            call([[1]], [[1]], nonsense=1) if call == engine.submit_scores else call([[1]], nonsense=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        Engine(engine, nonsense=1)  # type: ignore[call-arg]
