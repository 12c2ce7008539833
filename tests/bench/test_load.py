"""`bench.load`: times of real streams, from a bundle in this process and from a server, and no failure hidden."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chameleon_deploy import Runtime
from chameleon_deploy.bench.load.comparison import Plan, compare
from chameleon_deploy.bench.load.figures import Latency, summarize
from chameleon_deploy.bench.load.http import HttpTarget
from chameleon_deploy.bench.load.in_process import EngineTarget, StaticTarget
from chameleon_deploy.bench.load.requests import (
    Request,
    parse_range,
    poisson_arrivals,
    random_requests,
    read_requests,
)
from chameleon_deploy.bench.load.response import Response, body, events
from chameleon_deploy.bench.load.traffic import Record, Steps, closed_loop, open_loop
from chameleon_deploy.errors import InputError
from tests.commands import run
from tests.completion_server import CompletionServer, serve
from tests.serving import running


@pytest.fixture
def server() -> Iterator[CompletionServer]:
    with serve() as server:
        yield server


def record(due: float, arrivals: list[float], ended: float, error: str = "") -> Record:
    return Record(Request("text", 4), due, arrivals, ended, len(arrivals), error)


def test_percentiles_interpolate() -> None:
    latency = Latency.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert latency is not None
    assert (latency.p50, latency.p90, latency.p99) == pytest.approx((3.0, 4.6, 4.96))
    assert Latency.of([2.0]) == Latency(2.0, 2.0, 2.0)
    assert Latency.of([]) is None


def test_figures_of_known_times() -> None:
    figures = summarize([record(0, [1, 2, 4], 4), record(1, [2, 3], 3), record(0, [1], 2, "refused")], Steps(2, 5, 3.5))
    assert (figures.requests, figures.failed, figures.errors) == (3, 1, {"refused": 1})
    assert (figures.seconds, figures.requests_per_second, figures.tokens_per_second) == (4, 0.5, 1.25)
    assert figures.first_token == Latency(1, 1, 1)
    assert figures.inter_token is not None
    assert figures.inter_token.p50 == 1
    assert figures.end_to_end is not None
    assert figures.end_to_end.p50 == 3
    assert figures.in_flight == (4 + 2 + 2) / 4
    assert figures.rows_per_step == 2.5
    assert figures.decoder_idle == (4 - 3.5) / 2


def test_requests_of_a_seed() -> None:
    requests = random_requests(3, 200, (2, 5), (7, 7), 50, ["a", "b"])
    assert (
        requests
        == random_requests(3, 200, (2, 5), (7, 7), 50, ["a", "b"])
        != random_requests(4, 200, (2, 5), (7, 7), 50, ["a", "b"])
    )
    assert {len(request.prompt) for request in requests} == {2, 3, 4, 5}
    assert {request.max_tokens for request in requests} == {7}
    assert [request.model for request in requests[:3]] == ["a", "b", "a"]


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson_arrivals(0, 20_000, 50.0)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times[0] == 0
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.06)  # exponential


def test_requests_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 3}\n\n{"prompt": [1, 2], "max_tokens": 4, "model": "own"}\n')
    assert read_requests(path, 3, ["m"]) == [Request("a", 3, "m"), Request([1, 2], 4, "own"), Request("a", 3, "m")]
    path.write_text('{"prompt": "a", "max_tokens": 3}\n{"prompt": 7}\n')
    with pytest.raises(InputError, match="line 2"):
        read_requests(path, 1, [None])
    path.write_text("\n")
    with pytest.raises(InputError, match="no request"):
        read_requests(path, 1, [None])
    with pytest.raises(InputError, match="cannot read"):
        read_requests(tmp_path / "missing", 1, [None])


@pytest.mark.parametrize("text", ["", "a", "0", "9:3", "1:2:3"])
def test_lengths_that_make_no_sense(text: str) -> None:
    with pytest.raises(InputError):
        parse_range(text)
    assert (parse_range("5"), parse_range("3:9")) == ((5, 5), (3, 9))


@pytest.mark.parametrize("kind", [EngineTarget, StaticTarget])
def test_a_bundle_in_this_process(runtime: Runtime, kind: Any) -> None:
    target = kind(runtime, 4, 8) if kind is EngineTarget else kind(runtime, 4)
    requests = [*random_requests(0, 12, (3, 30), (2, 20), 512, ["centroid", "none"]), Request("The river", 5)][-12:]
    try:
        texts = requests[-1:]
        records = asyncio.run(closed_loop(target, requests[:-1], 4, 60))
        steps = asyncio.run(target.steps())
        records += asyncio.run(open_loop(target, texts * 3, [0, 0.01, 0.02], 60))
    finally:
        target.close()
    assert [record.error for record in records] == [""] * 14
    assert [record.new_tokens for record in records] == [record.request.max_tokens for record in records]
    for each in records:
        assert each.due < each.arrivals[0] <= each.arrivals[-1] <= each.ended
        assert each.arrivals == sorted(each.arrivals)
    # The engine hands out its last tokens before it tells of their step.
    assert 0 <= sum(record.new_tokens for record in records[:11]) - steps.rows <= 4
    assert 1 <= steps.rows / steps.count <= 4
    assert (steps.seconds is None) == (kind is StaticTarget)


def test_a_row_that_ends_early_waits_for_nobody_in_the_engine(runtime: Runtime) -> None:
    """The same requests: in static batches the third waits for the longest of the first two."""
    requests = [Request([1, 2, 3], 100), Request([4, 5, 6], 2), Request([7, 8, 9], 2)]

    def ended_last(target: EngineTarget | StaticTarget) -> int:
        try:
            records = asyncio.run(closed_loop(target, requests, 2, 60))
        finally:
            target.close()
        return max(range(3), key=lambda i: records[i].ended)

    assert ended_last(EngineTarget(runtime, 2, 8)) == 0
    assert ended_last(StaticTarget(runtime, 2)) == 2


def test_requests_that_fail_in_process(runtime: Runtime) -> None:
    requests = [Request([1, 2], 3), Request([1] * 500, 3), Request([1, 2], 3, "nonsense"), Request([999], 3)]
    for target in (EngineTarget(runtime, 2, 8), StaticTarget(runtime, 1)):
        try:
            records = asyncio.run(closed_loop(target, requests, 1, 60))
        finally:
            target.close()
        kinds = [record.error.partition(":")[0] for record in records]
        assert kinds == ["", "LengthError", "ModeError", "TokenError"]


def test_a_server(server: CompletionServer) -> None:
    server.pause = 0.02

    async def measure() -> tuple[list[Record], Steps | None]:
        target = HttpTarget(server.url)
        await target.open()
        return await closed_loop(target, random_requests(0, 4, (3, 9), (5, 5), 256), 2, 30), await target.steps()

    records, steps = asyncio.run(measure())
    assert steps == Steps(4, 16, 4.0)
    assert [record.error for record in records] == [""] * 4
    assert [len(record.arrivals) for record in records] == [record.new_tokens for record in records] == [5] * 4
    gaps = [gap for each in records for gap in map(float.__sub__, each.arrivals[1:], each.arrivals)]
    assert sorted(gaps)[len(gaps) // 2] == pytest.approx(0.02, rel=0.5)  # as they were sent, not all at the end
    assert {body["model"] for body in server.bodies} == {"stub"}
    assert all(body["stream"] and body["ignore_eos"] for body in server.bodies)


STREAM = [b'{"choices": [{"text": "[DONE]"}]}', b'{"choices": []}', b"[DONE]"]


def response_of(stream: list[bytes]) -> bytes:
    chunks = (b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data) for data in stream)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(chunks) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 7, 50, 1000])
def test_a_response_in_any_parts(size: int) -> None:
    whole = response_of(STREAM)
    parts = [(float(start), whole[start : start + size]) for start in range(0, len(whole), size)]
    found = list(events(body(parts)))
    assert [data for _, data in found] == STREAM
    for at, data in found:  # the time of the part that completed it
        assert at <= whole.rindex(data) + len(data) + 3 < at + 2 * size


def test_a_stream_ends_with_its_last_event_and_not_with_such_a_text() -> None:
    async def ends(stream: list[bytes]) -> bool:
        response = Response()
        response.data_received(response_of(stream))
        try:
            async with asyncio.timeout(0):
                await response.end()
        except TimeoutError:
            return False
        return True

    assert not asyncio.run(ends(STREAM[:2]))
    assert asyncio.run(ends(STREAM))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [({"fail": 2}, "429"), ({"break_at": 3}, "without [DONE]"), ({"api_key": "k"}, "401"),
     ({"pause": 9}, "within")],
)  # fmt: skip
def test_a_server_that_fails(server: CompletionServer, fault: dict[str, Any], reason: str) -> None:
    vars(server).update(fault)
    records = asyncio.run(closed_loop(HttpTarget(server.url), [Request("text", 5)] * 4, 1, 1.0))
    figures = summarize(records, None)
    assert figures.failed == (2 if "fail" in fault else 4)
    assert all(reason in error for error in figures.errors), figures.errors


def test_the_command_on_a_server(server: CompletionServer, tmp_path: Path) -> None:
    files = tmp_path / "load.json", tmp_path / "load.html"
    server.api_key = "secret"
    arguments = ["chameleon_deploy.bench.load", server.url, "--requests", 9, "--rate", 200, "--new-tokens", "2:4",
                 "--json", files[0], "--html", files[1]]  # fmt: skip
    result = run(*arguments, env={"OPENAI_API_KEY": "secret"})
    assert result.returncode == 0, result.stderr
    figures = json.loads(files[0].read_text())
    assert (figures["requests"], figures["failed"]) == (9, 0)
    assert figures["first_token"]["p99"] >= figures["first_token"]["p50"] > 0
    assert files[1].read_text().count("<svg") == 2
    refused = run(*arguments, env={"OPENAI_API_KEY": "wrong"})
    assert refused.returncode == 2
    assert "the API key is missing or wrong" in refused.stderr


def test_the_command_on_our_server(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    with running(bundle, rows=4) as server:
        models = ["--model", server.name, "--model", f"{server.name}:none"]
        result = run("chameleon_deploy.bench.load", server.url, "--requests", 12, "--prompt-tokens", "4:30",
                     "--new-tokens", "3:20", *models, "--json", file)  # fmt: skip
        assert result.returncode == 0, result.stderr
        figures = json.loads(file.read_text())
        assert figures["failed"] == 0
        assert 1 <= figures["rows_per_step"] <= 4
        refused = run("chameleon_deploy.bench.load", server.url, "--requests", 3, "--prompt-tokens", 200)
    assert refused.returncode == 1
    assert "3 of 3 requests" in refused.stderr
    assert "text_too_long" in refused.stderr


def test_the_command_on_a_bundle(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    arguments = ["chameleon_deploy.bench.load", bundle, "--threads", 1, "--requests", 6, "--prompt-tokens", "4:20",
                 "--new-tokens", 6, "--streams", 3, "--rows", 3, "--model", "centroid", "--model", "none",
                 "--json", file]  # fmt: skip
    for static in ([], ["--static"]):
        result = run(*arguments, *static)
        assert result.returncode == 0, result.stderr
        figures = json.loads(file.read_text())
        assert (figures["requests"], figures["failed"]) == (6, 0)
        assert 1 <= figures["rows_per_step"] <= 3
        assert "tokens/s" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["http://127.0.0.1:9"], "input_invalid"),
        (["http://127.0.0.1:9", "--static"], "input_invalid"),
        (["http://"], "input_invalid"),
        (["http://127.0.0.1:9", "--scenario"], "input_invalid"),
        (["nowhere", "--scenario", "--rate", "2"], "input_invalid"),
        (["nowhere", "--scenario", "--server", "http://127.0.0.1:9"], "input_invalid"),
        (["nowhere", "--server", "a=http://127.0.0.1:9"], "input_invalid"),
        (["nowhere"], "bundle_not_found"),
        (["nowhere", "--new-tokens", "x"], "input_invalid"),
        (["nowhere", "--rate", "0"], "usage"),
    ],
)
def test_bad_arguments(arguments: list[str], code: str) -> None:
    result = run("chameleon_deploy.bench.load", *arguments)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"[{code}]" in result.stderr


def test_ratios(runtime: Runtime) -> None:
    plan = Plan(rows=4, prefill_tokens=8, prompt_tokens=8, new_tokens=8, ragged=(2, 24), requests=8, rounds=2)
    ratios = compare(runtime, plan, lambda what, done, total: None)
    assert [list(ratio.values) for ratio in ratios] == [
        ["engine", "offline generate"], ["engine", "static batches"], ["static batches", "engine"],
        ["engine, centroid", "engine, none"],
    ]  # fmt: skip
    for ratio in ratios:
        assert ratio.ratio > 0
        assert ratio.interquartile_range[0] <= ratio.ratio <= ratio.interquartile_range[1]
    with pytest.raises(InputError, match="512 positions"):
        compare(runtime, Plan(), lambda what, done, total: None)


def test_ratios_of_servers(bundle: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(rows=4, prompt_tokens=8, new_tokens=8, ragged=(2, 24), requests=8, rounds=1)
    models = []
    complete = HttpTarget.complete

    async def noted(self: HttpTarget, record: Record) -> None:
        models.append(record.request.model)
        await complete(self, record)

    monkeypatch.setattr(HttpTarget, "complete", noted)
    with running(bundle, rows=4) as server, serve() as other:
        servers = {"ours": HttpTarget(server.url), "other": HttpTarget(other.url)}
        ratios = compare(runtime, plan, lambda what, done, total: None, servers)
    assert [list(ratio.values) for ratio in ratios] == [
        ["ours", "offline generate"], ["ours", "static batches"], ["static batches", "ours"],
        ["ours, centroid", "ours, none"], ["ours", "other"],
    ]  # fmt: skip
    assert set(models) == {f"{server.name}:centroid", f"{server.name}:none", "stub:none"}
