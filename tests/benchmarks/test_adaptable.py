"""`benchmarks.adaptable`: which adapters are in use in each case, and that a bundle must take any."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import adaptable
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from tests.commands import call


@pytest.fixture(scope="module")
def bundles(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that takes adapters, and a plain one."""
    out, base = tmp_path_factory.mktemp("adaptable"), str(llama_path / "base")
    export_bundle(load_adapted(base, {}, adaptable=["all"], max_rank=4), out / "adaptable")
    export_bundle(load_adapted(base, {}), out / "plain")
    return out / "adaptable", out / "plain"


def test_cases_have_the_adapters_of_their_names() -> None:
    found = adaptable.cases(["a", "b"], 4)
    assert list(found.values()) == [[None] * 4, ["a"] * 4, [None, "a", None, "a"], ["a", "b", "a", "b"]]


def test_every_case_is_timed_beside_the_plain_bundle(bundles: tuple[Path, Path]) -> None:
    options = ["--adapters", 2, "--rank", 2, "--batch", 4, "--tokens", 3, "--rounds", 2, "--threads", 1]
    result = call("benchmarks.adaptable", *bundles, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    printed = " ".join(result.stdout.split())
    for name in (adaptable.PLAIN, *adaptable.cases(["a", "b"], 4)):
        assert name in printed
    assert "rank 2 on 14 layers; 1 threads" in printed


def test_a_bundle_that_takes_no_adapters_is_refused(bundles: tuple[Path, Path]) -> None:
    result = call("benchmarks.adaptable", bundles[1], bundles[1])
    assert result.returncode == 2
    assert "export it with --adaptable" in " ".join(result.stderr.split())
