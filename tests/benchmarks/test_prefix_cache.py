"""`benchmarks.prefix_cache`: the command, on a model that has too few positions for its longest prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

import chameleon_deploy
from benchmarks import prefix_cache
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from tests.commands import call


def test_the_command(bundle: Path) -> None:
    sizes = ["--rounds", 1, "--threads", 1, "--prompt-tokens", 40, "--new-tokens", 2]
    result = call("benchmarks.prefix_cache", bundle, *sizes)
    assert result.returncode == 0, result.stderr
    assert "look-up of 1024 tokens at 9,984 blocks" in result.stdout
    assert "throughput without hits, 40 + 2 tokens" in result.stdout
    assert "0 hits" in result.stdout


def test_a_second_turn_and_adapters_behind_one_prefix(
    llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prefix_cache, "PREFIX_TOKENS", 64)
    base = load_adapted(str(llama_path / "base"), {}, adaptable=["q_proj"], max_rank=prefix_cache.RANK)
    export_bundle(base, tmp_path / "bundle")
    runtime = chameleon_deploy.load(tmp_path / "bundle", threads=1)
    prompts = prefix_cache.Prompts(runtime.manifest.model.vocab_size)
    prefix_cache.time_adapters(runtime, prompts, 1, tmp_path)
    monkeypatch.setattr(prefix_cache, "ANSWER_TOKENS", 12)
    prefix_cache.time_first_tokens(runtime, prompts, 1)
    printed = capsys.readouterr().out
    assert "first tokens of 8 adapters behind one prefix, plain" in printed
    assert "the second turn without reading these takes" in printed
