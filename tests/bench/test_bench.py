"""`bench`: it times what it says, notices a fast wrong answer, and hides no engine that could not run."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.bench import report
from chameleon_deploy.bench.footprint import Footprint
from chameleon_deploy.bench.peers import Peer, Rows, open_peers
from chameleon_deploy.bench.peers.bundle import Bundle, FullLogits, OneCallPerSet
from chameleon_deploy.bench.peers.ctranslate2 import CTranslate2
from chameleon_deploy.bench.peers.openvino import OpenVINO
from chameleon_deploy.bench.peers.pytorch import PyTorch
from chameleon_deploy.bench.peers.without_lora import WithoutLoRA, remove_lora
from chameleon_deploy.bench.run import Benchmark
from chameleon_deploy.bench.workloads import BOUNDS, Workloads, text_rows
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint
from chameleon_deploy.terminal import console
from tests.commands import call
from tests.conftest import REPOSITORY
from tests.page import Page


@pytest.fixture(scope="module")
def rows(mini: Checkpoint) -> Rows:
    return text_rows(mini, 6, 24)


def test_clusters_take_turns_in_the_texts(mini: Checkpoint) -> None:
    found = [len(set(inference.adapt(mini, text_rows(mini, n, 24), "none").cluster_ids.tolist())) for n in (1, 2, 8)]
    assert found == [1, 2, mini.config.num_clusters]


@pytest.fixture(scope="module")
def opened(runtime: Runtime, mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Peer]:
    directory = tmp_path_factory.mktemp("converted")
    peers: list[Peer] = [
        Bundle(runtime), OneCallPerSet(runtime, "one call per cluster"), FullLogits(runtime),
        WithoutLoRA(runtime),
        PyTorch(mini, runtime.mode, compiled=False), CTranslate2(mini.trunk, "fp32", 1, directory),
        CTranslate2(mini.trunk, "int8", 1, directory / "int8"), OpenVINO(mini.trunk, "fp32", 1, directory),
        OpenVINO(mini.trunk, "int8", 1, directory / "int8"),
    ]  # fmt: skip
    return {peer.name: peer for peer in peers}


def test_factors_of_any_layers_are_applied(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "checkpoint", "mini", targets=["attention", "lm_head"])
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    export_bundle(checkpoint, tmp_path / "bundle")
    runtime = chameleon_deploy.load(tmp_path / "bundle", threads=1)
    peers: list[Peer] = [
        Bundle(runtime), OneCallPerSet(runtime, "apart"), PyTorch(checkpoint, runtime.mode, compiled=False)
    ]  # fmt: skip
    work = Workloads(runtime, checkpoint, peers)
    rows = text_rows(checkpoint, 6, 24)
    for case in (work.scoring(rows), work.generation(rows, 4)):
        for engine in case.contestants.values():
            assert engine.deviation(engine.run(lambda lap: None)) <= engine.bound


NAMES = ["bundle", "one call per cluster", "full logits", "without LoRA", "PyTorch eager fp32", "CTranslate2 fp32",
         "CTranslate2 int8", "OpenVINO fp32", "OpenVINO int8"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_engine_gives_what_the_reference_gives(
    name: str, opened: dict[str, Peer], runtime: Runtime, mini: Checkpoint, rows: Rows
) -> None:
    peer = opened[name]
    work = Workloads(runtime, mini, [peer])
    laps: list[str] = []
    if peer.generates:
        generation = work.generation(rows, 5).contestants[name]
        chosen = generation.run(laps.append)
        assert chosen.shape == (6, 5)
        adapts = "adapt" in laps
        assert adapts == (peer.adapts or name == "without LoRA")
        assert laps == ["adapt"] * adapts + ["prefill", "decode"] * (len(laps) // 2)
        assert generation.deviation(chosen) <= generation.bound
    if peer.scores:
        scoring = work.scoring(rows).contestants[name]
        scores = scoring.run(laps.append)
        assert scores.shape == (6, 23)
        assert scoring.deviation(scores) <= scoring.bound


def test_no_token_ends_a_row_of_pytorch(mini: Checkpoint, rows: Rows) -> None:
    """A configuration of the model names the second token as its end: the rows go on, and are not padded."""
    tokens = PyTorch(mini, "none", compiled=False).generate(rows, 5, lambda part: None)
    peer = PyTorch(mini, "none", compiled=False)
    peer._model.generation_config.eos_token_id = int(tokens[0, 1])
    np.testing.assert_array_equal(peer.generate(rows, 5, lambda part: None), tokens)


def test_wrong_results_are_beyond_the_bounds(
    opened: dict[str, Peer], runtime: Runtime, mini: Checkpoint, rows: Rows
) -> None:
    """One wrong token, another prompt's tokens, and the scores of the base model instead of the adapted one."""
    bundle = opened["bundle"]
    work = Workloads(runtime, mini, [bundle])
    generation, scoring = work.generation(rows, 5).contestants["bundle"], work.scoring(rows).contestants["bundle"]
    chosen = generation.run(lambda part: None)
    wrong_token = chosen.copy()
    wrong_token[3, 2] = (wrong_token[3, 2] + 1) % runtime.manifest.model.vocab_size
    assert generation.deviation(wrong_token) > generation.bound
    scores = scoring.run(lambda part: None)
    assert scoring.deviation(scores[::-1]) > scoring.bound
    unadapted = opened["without LoRA"].score(rows)
    assert np.abs(unadapted - scores).max() > 10 * BOUNDS["fp32"]
    assert scoring.deviation(unadapted) > scoring.bound


@pytest.mark.parametrize("graph", ["decoder", "decoder_cpu"])
def test_a_graph_without_lora_has_nothing_left_of_it(graph: str, bundle: Path) -> None:
    model = ir.load(bundle / f"{graph}.onnx")
    before = len(list(model.graph))
    remove_lora(model.graph)
    names = {"lm_head.lora_A", "lm_head.lora_B", "factor_ids"}
    assert not any(value.uses() for value in model.graph.inputs if value.name in names)
    assert len(list(model.graph)) < before - 5
    with pytest.raises(ValueError, match="no sum"):
        remove_lora(model.graph)


@pytest.fixture(scope="module")
def smoke(bundle: Path, mini_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], str]:
    """What a smoke run prints, its JSON and its page."""
    out = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "active")
        result = call("chameleon_deploy.bench", bundle, "--reference", mini_path, "--threads", 1, "--smoke",
                      "--rounds", 1, "--json", out / "bench.json", "--html", out / "bench.html")  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((out / "bench.json").read_text()), (out / "bench.html").read_text()


def test_smoke_has_every_figure(smoke: tuple[str, dict[str, Any], str]) -> None:
    printed, record, _ = smoke
    names = [timing["part"]["name"] for timing in record["timings"]]
    for expected in ("scoring 8x32", "time to first token", "prefill 1x32 + first token", "decode, batch 1, past 32",
                     "prefill 8x32 + first token", "prefill 8x32 + 9 tokens", "decode, batch 8, past 32"):  # fmt: skip
        assert any(name.startswith(expected) for name in names), expected
    for timing in record["timings"]:
        assert set(timing["ratios"]) >= {"PyTorch eager fp32", "without LoRA"}
        assert all(ratio > 0 for ratio in timing["ratios"].values())
        assert set(timing["deviations"]) >= set(timing["seconds"])
    assert "one call per cluster" in record["timings"][-1]["ratios"]
    footprint = record["footprint"]
    assert 0 < footprint["shared_private"] < footprint["resident"] <= footprint["peak"]
    assert min(footprint["load_seconds"], footprint["shared_load_seconds"]) > 0
    assert record["machine"]["onnxruntime"]
    assert "OMP_WAIT_POLICY=active" in record["machine"]["environment"]
    assert "OMP_WAIT_POLICY=active" in " ".join(printed.split())
    assert record["quality"]["bundle"]["mean_kl"] < 1e-7
    assert "same best token" in printed
    assert "Peak with a generation of batch 8" in printed


def test_a_base_model_is_exported_for_one_run(mini_path: Path, tmp_path: Path) -> None:
    result = call("chameleon_deploy.bench", "--model", mini_path / "base", "--precision", "int8", "--threads", 1,
                  "--smoke", "--batch", 1, "--rounds", 1, "--engine", "PyTorch", "--case", "first-token",
                  "--json", tmp_path / "bench.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["precision"] == "int8"
    assert set(record["quality"]) == {"bundle", "PyTorch eager fp32"}
    assert [timing["part"]["kind"] for timing in record["timings"]] == ["first_token"]
    assert set(record["timings"][0]["ratios"]) == {"PyTorch eager fp32"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model NAME"),
        (["BUNDLE"], "--reference CHECKPOINT"),
        (["BUNDLE", "--model", "smollm2"], "pass no bundle"),
        (["BUNDLE", "--reference", "models/tiny", "--precision", "int8"], "a bundle has its precision"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    result = call("chameleon_deploy.bench", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_smoke_makes_a_page(smoke: tuple[str, dict[str, Any], str]) -> None:
    _, record, html = smoke
    page = Page(html)
    assert page.fetched == []
    assert page.tags.count("svg") == 3
    for timing in record["timings"]:
        assert timing["part"]["name"] in page.text


def test_a_fast_wrong_answer_is_an_error(bundle: Path, mini_path: Path, copy_of: Callable[[Path], Path]) -> None:
    other = copy_of(mini_path)
    tensors = load_file(other / "chameleon.safetensors")
    tensors["hypernetwork.2.weight"] *= 3
    save_file(tensors, other / "chameleon.safetensors")
    result = call("chameleon_deploy.bench", bundle, "--reference", other, "--threads", 1, "--smoke", "--batch", 1,
                  "--rounds", 1)  # fmt: skip
    assert result.returncode == 1
    assert "scoring 8x32: bundle deviates by" in result.stderr


def test_a_missing_engine_is_printed_with_its_extra(
    runtime: Runtime, mini: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Brackets are text: rich would take `[peers]` for markup and print `pip install 'chameleon-deploy'`."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError(name='llama_cpp')")
    monkeypatch.syspath_prepend(tmp_path)  # it is imported in a process of its own
    _, missing = open_peers(runtime, mini, 1, tmp_path, True, ["CTranslate2", "OpenVINO", "llama.cpp"])
    assert set(missing) == {"CTranslate2 fp32", "OpenVINO fp32", "llama.cpp F32"}
    console.show(report.missing_sheet(_benchmark(missing)))
    printed = capsys.readouterr().out
    assert printed.count("pip install 'chameleon-deploy[peers]'") == 2
    assert printed.count("pip install 'chameleon-deploy[peers-llama]'") == 1


def test_from_a_wheel_other_engines_are_compared_from_a_clone(
    runtime: Runtime, mini: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The modules that pyproject.toml keeps out of the wheel are missing here."""
    excluded = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    files = [REPOSITORY / file for file in excluded["exclude"]]
    assert len(files) == 8
    for file in files:
        assert file.is_file()
        monkeypatch.setitem(sys.modules, ".".join(file.relative_to(REPOSITORY).with_suffix("").parts), None)
    peers, missing = open_peers(runtime, mini, 1, tmp_path, foreign=True)
    assert [peer.name for peer in peers] == ["bundle", "full logits", "one call per cluster"]
    assert len(missing) == 6
    report.print_tables(_benchmark(missing))
    printed = capsys.readouterr().out
    assert printed.count("run bench from a clone of the repository") == 6
    assert "This is an installed wheel: other engines are compared from a clone" in printed


def test_a_report_says_where_int8_weights_would_saturate() -> None:
    def summary(machine: dict[str, str]) -> str:
        return " ".join(report.summary(replace(_benchmark({}), machine={"processor": "one", **machine})))

    assert "int8 weights would saturate" in summary({"integer weights": "uint8"})
    assert "int8 weights" not in summary({"integer weights": "int8"}) + summary({})


def _benchmark(missing: dict[str, str]) -> Benchmark:
    return Benchmark({"processor": "one"}, "fp32", 1, 1, Footprint(1.0, 1, 1, 1.0, 1), [], {}, missing)
