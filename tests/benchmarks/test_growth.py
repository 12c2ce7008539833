"""`benchmarks.growth`: every point of every curve, in processes that end, and no failure hidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth as growth_module
from benchmarks.growth import CURVES, CurveName, points
from tests.commands import call

ENGINES = ["bundle", "PyTorch eager fp32"]


@pytest.fixture(scope="module")
def growth(bundle: Path, mini_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """The JSON, its file, and the tables of a run on the mini model, with an engine that does not exist.

    Two points of the long curves: the others are measured alike.
    """
    out = tmp_path_factory.mktemp("growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth_module, "BATCHES", (1, 32))
        patch.setattr(growth_module, "PAUSE", 0)  # the engines have one thread, and none that spins
        result = call("benchmarks.growth", bundle, "--reference", mini_path, "--threads", 1, "--rounds", 1,
                      "--largest", 32, "--engine", ENGINES[1], "--engine", "no such engine",
                      "--json", out / "growth.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads((out / "growth.json").read_text()), out / "growth.json", result.stdout


def test_every_point_is_measured(growth: tuple[dict[str, Any], Path, str]) -> None:
    record, _, printed = growth
    for curve in CURVES:
        expected = [point.x for point in points(curve, 128, 32)]
        assert expected
        for engine in ENGINES if curve != "factor_sets" else ENGINES[:1]:
            own = [one for one in record["measured"] if (one["curve"], one["engine"]) == (curve, engine)]
            assert [one["x"] for one in own] == [x for x in expected if curve == "length" or x in (1, 32)]
            assert all(one["first_token"] > 0 and one["step"] > 0 and one["memory"] >= 0 for one in own)
    assert record["failed"] == {"no such engine": "there is no engine of this name"}
    assert "there is no engine of this name" in printed


def test_memory_grows_with_the_batch(growth: tuple[dict[str, Any], Path, str]) -> None:
    """The logits and the cache of 32 rows alone are larger than those of one."""
    record, _, _ = growth
    own = {
        one["x"]: one["memory"] for one in record["measured"] if (one["curve"], one["engine"]) == ("batch", "bundle")
    }
    assert own[32] > own[1] + 32 * 512 * 4


def test_every_curve_is_drawn(growth: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    result = call("benchmarks.growth_plots", tmp_path / "plots", growth[1])
    assert result.returncode == 0, result.stderr
    drawings = {file.name: file.read_text() for file in (tmp_path / "plots").iterdir()}
    assert set(drawings) == {f"fp32-{curve}.svg" for curve in CURVES}
    assert all(ENGINES[0] in drawing for drawing in drawings.values())
    assert ENGINES[1] in drawings["fp32-batch.svg"]


def test_points_fit_the_model() -> None:
    assert [point.width for point in points(CurveName.LENGTH, 128)] == [32, 111]
    assert [point.width for point in points(CurveName.LENGTH, 8192)][-2:] == [4096, 8175]
    assert [point.factor_sets for point in points(CurveName.FACTOR_SETS, 8192, 4)] == [1, 2, 4]
    for curve in CURVES:
        assert all(point.width + point.steps + 1 <= 128 for point in points(curve, 128))


def test_a_process_that_dies_is_an_error_with_its_last_line(bundle: Path, tmp_path: Path) -> None:
    result = call("benchmarks.growth", bundle, "--reference", tmp_path, "--threads", 1, "--largest", 1)
    assert result.returncode == 2
    assert "neither chameleon_config.json nor adapter_config.json" in result.stderr
