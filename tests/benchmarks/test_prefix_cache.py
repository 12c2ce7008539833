"""`benchmarks.prefix_cache`: the command, on a model that has too few positions for its longest prompts."""

from __future__ import annotations

from pathlib import Path

from tests.commands import run


def test_the_command(bundle: Path) -> None:
    sizes = ["--rounds", 1, "--threads", 1, "--prompt-tokens", 40, "--new-tokens", 2]
    result = run("benchmarks.prefix_cache", bundle, *sizes)
    assert result.returncode == 0, result.stderr
    assert "look-up of 1024 tokens at 9,984 blocks" in result.stdout
    assert "throughput without hits, 40 + 2 tokens" in result.stdout
    assert "0 hits" in result.stdout
