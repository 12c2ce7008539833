"""`benchmarks.tables` and `benchmarks.pretrained`: the published tables, from commands that exist."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth_plots, pretrained, tables
from chameleon_deploy.bench.footprint import Footprint
from chameleon_deploy.bench.quality import Quality
from chameleon_deploy.bench.run import Benchmark
from chameleon_deploy.bench.timing import Part, Timing
from chameleon_deploy.errors import CheckFailedError
from chameleon_deploy.terminal import console
from tests.conftest import REPOSITORY

SECONDS, RATIOS = 0.5, {"PyTorch eager fp32": 4.0, "CTranslate2 fp32": 1.25, "OpenVINO fp32": 1.5, "full logits": 1.3,
                        "one call per cluster": 2.0, "without LoRA": 0.8}  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    """What `bench --json` writes, with a figure for each cell of the tables."""
    sizes = [("scoring", 8), ("prefill", 8), ("decode", 1), ("decode", 8), ("decode", 32), ("generation", 8)]
    timings = [
        Timing(part=Part(kind, kind, 32, "step", batch), baseline="bundle", seconds={"bundle": SECONDS}, ratios=RATIOS,
               interquartile_range={}, rounds=1, retries=0, disturbed=0, deviations={}, bounds={}, failed={})
        for kind, batch in sizes
    ]  # fmt: skip
    quality = {name: Quality(1e-3, 1e-2, 0.95, 27.5, 27.0, 150_000_000) for name in ("bundle", "PyTorch eager fp32")}
    return asdict(Benchmark({}, "fp32", 2, 1, Footprint(0.8, 2, 3 * 2**20, 1.0, 2**20), timings, quality, {}))


def cells(printed: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line]
    return {name: rest for name, *rest in lines}


def test_the_table_of_a_model_with_random_weights(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fp32.json").write_text(json.dumps(record))
    tables.untrained([tmp_path / "fp32.json"])
    found = cells(capsys.readouterr().out)
    assert found["scoring 8x128"] == ["4.00 / 1.25"]
    assert found["adaptation overhead, decode batch 8"] == ["+25.0%"]
    assert found["peak resident memory, batch 8 x (128 + 33)"] == ["3 MiB"]
    documented = (REPOSITORY / "docs" / "lab" / "performance.md").read_text()
    assert all(f"| {name} |" in documented for name in found if name not in ("", "---"))


def test_the_tables_of_a_pretrained_model(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files of one precision are put together; times are the bundle's times the paired ratios."""
    first = {**record, "timings": [timing for timing in record["timings"] if timing["part"]["batch"] != 8]}
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, content in zip(files, (first, {**record, "quality": {}}), strict=True):
        file.write_text(json.dumps(content))
    tables.pretrained(files)
    found = cells(capsys.readouterr().out)
    step = 1e3 * SECONDS / 32
    assert float(found["**bundle fp32**"][8]) == pytest.approx(step, abs=0.06)
    assert float(found["PyTorch eager fp32"][8]) == pytest.approx(4 * step, abs=0.06)
    assert found["step, batch 8"] == ["1.25 (CTranslate2 fp32)", "", "4.00 (PyTorch eager fp32)", "+25.0%"]
    headings = "| " + " | ".join(["engine", *found["engine"]]) + " |"
    assert headings in (REPOSITORY / "docs" / "lab" / "performance.md").read_text()


def test_every_step_of_the_pretrained_run_is_a_command_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def parse(file: Path, module: str, *arguments: object) -> None:
        found: Any = importlib.import_module(module)
        if hasattr(found, "__path__"):
            found = importlib.import_module(f"{module}.__main__")
        console.make_command(getattr(found, "app", None) or found.main).make_context(module, [*map(str, arguments)])
        made.append(file)

    drawn: list[list[Path]] = []
    monkeypatch.setattr(pretrained, "step", parse)
    monkeypatch.setattr(growth_plots, "main", lambda directory, files: drawn.append(files))
    monkeypatch.setattr(tables, "pretrained", drawn.append)
    monkeypatch.setattr(tables, "headline", lambda figures: drawn.extend(figures.values()))
    pretrained.main(tmp_path, [tmp_path / "text"], 1)
    assert len(made) == len(set(made)) == 1 + 2 + 4 + 4 + 2 + 6
    kinds = ("quality", "steps", "pp512", "tg128", "loading-", "growth-")
    of = {kind: [f for f in made if kind in f.name] for kind in kinds}
    assert drawn[0] == of["quality"] + of["steps"]
    assert drawn[1:] == [of[kind] for kind in ("steps", "pp512", "tg128", "quality", "loading-", "growth-")]
    made.clear()
    (tmp_path / "qwen.gguf").touch()
    pretrained.main(tmp_path, base=str(tmp_path / "qwen.gguf"), precision=["int4"])
    assert tmp_path / "qwen-int4" in made
    assert len(made) == 1 + 1 + 2 + 2 + 1 + 3


def test_the_headline(record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure of an engine stands in its column; an engine without quality or loading has empty cells."""
    record["timings"].append({**record["timings"][1], "part": {**record["timings"][1]["part"], "batch": 1}})
    loaded = {"bundle fp32": {"seconds": 1.25, "resident": 2e9, "peak": 3e9, "size": 1e8}}
    file, loading = tmp_path / "figures.json", tmp_path / "loading.json"
    file.write_text(json.dumps(record))
    loading.write_text(json.dumps(loaded))
    tables.headline({**{kind: [file] for kind in ("steps", "pp512", "tg128", "quality")}, "loading": [loading]})
    found, step = cells(capsys.readouterr().out), 1e3 * SECONDS / 32
    speed, steps = [f"{32 / SECONDS:.1f}"] * 2, [f"{step:.1f}"] * 3
    assert found["**bundle fp32**"] == ["1.0e-03", "100", "2,000", "1.2", *speed, *steps]
    assert found["OpenVINO fp32"] == ["", "", "", "", *[f"{32 / SECONDS / 1.5:.1f}"] * 2, *[f"{1.5 * step:.1f}"] * 3]
    assert found["PyTorch eager fp32"][0] == "1.0e-03"
    assert not found.keys() & {"full logits", "without LoRA"}


def test_a_step_that_is_done_is_not_repeated_and_one_that_fails_ends_the_run(tmp_path: Path) -> None:
    pretrained.step(tmp_path, "chameleon_deploy.inspect", "nowhere")
    with pytest.raises(CheckFailedError, match="did not make"):
        pretrained.step(tmp_path / "made", "chameleon_deploy.inspect", "nowhere")
