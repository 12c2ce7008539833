"""benchmarks/roofline.py: plausible ceilings, and the work of a graph counted right."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.roofline import Roofline, Weights, measure_roofline, share_sheet
from chameleon_deploy.bench.timing import Part
from chameleon_deploy.contract.bundle import open_bundle


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_roofline_is_plausible(precision: str) -> None:
    roofline = measure_roofline(1, precision)
    assert 1e8 < roofline.bytes_per_second < 1e13
    assert 1e8 < roofline.operations_per_second < 1e15


@pytest.mark.parametrize("graph", ["decoder", "decoder_cpu"])
@pytest.mark.parametrize(("fixture", "last_layer"), [("bundle", 9 * 64 * 64), ("llama_bundle", 64 * 64 + 3 * 64 * 160)])
def test_behind_the_last_attention_only_positions_with_logits_count(
    graph: str, fixture: str, last_layer: int, request: pytest.FixtureRequest
) -> None:
    weights = Weights(open_bundle(request.getfixturevalue(fixture)), graph)
    assert weights.of_positions == 512 * 64 + last_layer
    assert weights.work(tokens=5, positions=2)[1] == 2 * (5 * weights.of_tokens + 2 * weights.of_positions)


def test_the_share_of_the_least_time(bundle: Path) -> None:
    opened = open_bundle(bundle)
    part = Part("decode", "decode, batch 2", 4, "step", batch=2, width=8, new_tokens=5)
    weights = Weights(opened, opened.graph("decoder", "cpu"))
    num_bytes = 4 * weights.bytes + 4 * 2 * 8 * weights.cache_bytes
    timings = [
        {"part": asdict(part), "baseline": "bundle", "seconds": {"bundle": 2.0}},
        {"part": {**asdict(part), "kind": "adaptation"}, "baseline": "bundle", "seconds": {"bundle": 2.0}},
    ]
    sheet = share_sheet(weights, timings, Roofline(num_bytes, 1e30))
    assert sheet.rows == [["decode, batch 2", "1000.000", "2000.000", "50%"]]
