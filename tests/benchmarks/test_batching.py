"""`benchmarks.batching`: engine, static batches and `generate` do the same work, and no failure is hidden."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.batching import (
    Comparison,
    Plan,
    Record,
    Request,
    StaticBatches,
    closed_loop,
    open_loop,
    parse_range,
    poisson_arrivals,
)
from chameleon_deploy import Runtime
from chameleon_deploy.errors import InputError, LengthError, TokenError
from tests.commands import call

PLAN = Plan(rows=4, prefill_tokens=8, prompt_tokens=8, new_tokens=8, ragged=(2, 24), requests=8, rounds=2)


@pytest.fixture
def comparison(runtime: Runtime) -> Iterator[Comparison]:
    with closing(Comparison(runtime, PLAN, lambda what, done, total: None)) as comparison:
        yield comparison


def test_requests_have_the_lengths_of_the_plan_and_clusters_that_alternate(
    runtime: Runtime, comparison: Comparison
) -> None:
    requests = comparison._requests((2, 5), (7, 7))
    assert requests == comparison._requests((2, 5), (7, 7))
    assert {len(request.prompt) for request in requests} <= {2, 3, 4, 5}
    assert {request.new_tokens for request in requests} == {7}
    clusters = runtime.embed([request.prompt for request in requests])[1].tolist()
    assert all(one != other for one, other in itertools.pairwise(clusters))


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson_arrivals(0, 20_000, 50.0)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times[0] == 0
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.06)  # exponential


def test_every_token_has_its_time(runtime: Runtime, comparison: Comparison) -> None:
    requests = comparison._requests((3, 30), (2, 20))
    arrivals = [0.01 * i for i in range(len(requests))]
    static = StaticBatches(runtime, 4, "centroid").complete
    runs = [
        comparison._continuous(requests), comparison._continuous(requests, arrivals),
        asyncio.run(closed_loop(static, requests, 4)), asyncio.run(open_loop(static, requests, arrivals)),
    ]  # fmt: skip
    for records in runs:
        assert [len(record.arrivals) for record in records] == [request.new_tokens for request in requests]
        for record in records:
            assert record.arrivals == sorted(record.arrivals)
            assert record.due < record.arrivals[0]


def test_a_row_that_ends_early_waits_for_nobody_in_the_engine(runtime: Runtime) -> None:
    """The same requests: in static batches the third waits for the longest of the first two."""
    requests = [Request([1, 2, 3], 100), Request([4, 5, 6], 2), Request([7, 8, 9], 2)]

    def last(records: list[Record]) -> int:
        return max(range(3), key=lambda i: records[i].arrivals[-1])

    with closing(Comparison(runtime, Plan(rows=2, ragged=(2, 24), prompt_tokens=8, new_tokens=8), _ignore)) as two_rows:
        assert last(two_rows._continuous(requests)) == 0
        assert last(two_rows._static(requests)) == 2


def test_a_request_that_fails_ends_the_run(comparison: Comparison) -> None:
    for request, error in ((Request([1] * 500, 3), LengthError), (Request([999], 3), TokenError)):
        for serve in (comparison._continuous, comparison._static):
            with pytest.raises(error):
                serve([Request([1, 2], 3), request])


def test_ratios(runtime: Runtime, comparison: Comparison) -> None:
    ratios = comparison.ratios()
    assert [list(ratio.values) for ratio in ratios] == [
        ["engine", "offline generate"], ["engine", "static batches"], ["static batches", "engine"],
        ["engine, centroid", "engine, none"],
    ]  # fmt: skip
    for ratio in ratios:
        assert ratio.ratio > 0
        assert ratio.interquartile_range[0] <= ratio.ratio <= ratio.interquartile_range[1]
    with pytest.raises(InputError, match="512 positions"):
        Comparison(runtime, Plan(), _ignore)


@pytest.mark.parametrize("text", ["", "a", "5", "0:2", "9:3", "1:2:3"])
def test_bounds_that_make_no_sense(text: str) -> None:
    with pytest.raises(InputError):
        parse_range(text)
    assert parse_range("3:9") == (3, 9)


def test_the_command(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--threads", 1, "--requests", 6, "--prompt-tokens", 8, "--new-tokens", 6, "--ragged", "2:9", "--rows", 3,
             "--rounds", 1, "--json", file]  # fmt: skip
    result = call("benchmarks.batching", bundle, *sizes)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(file.read_text())["ratios"]) == 4
    alone = call("benchmarks.batching", bundle, *sizes, "--alone")
    assert alone.returncode == 0, alone.stderr
    figures = json.loads(file.read_text())
    assert figures["plan"]["rows"] == 3
    assert 1 <= figures["rows_per_step"] <= 3
    assert 0 < figures["first_token"][0] <= figures["first_token"][2]
    assert "tokens/s" in alone.stdout


def _ignore(what: str, done: int, total: int) -> None:
    pass
