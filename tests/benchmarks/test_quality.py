"""benchmarks/quality.py: a bundle of the base is near it, and one of another base is not."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks import quality
from chameleon_deploy.errors import DependencyError


def mean_kl(shown: str, engine: str) -> float:
    found = re.search(rf"{engine} *│ *(\S+)", shown)
    assert found, shown
    return float(found[1])


def test_engines_are_near_the_base_they_were_made_of(
    llama_path: Path, llama_bundle: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama_path / "base"
    quality.main(base, [llama_bundle], [], ["int8", "int4"], text=None, windows=2, width=24, threads=1)
    shown = capsys.readouterr().out
    assert abs(mean_kl(shown, "bundle fp32")) < 1e-6
    assert 1e-6 < mean_kl(shown, "OpenVINO int8") < mean_kl(shown, "OpenVINO int4") < 1
    quality.main(base, [bundle], [], [], text=None, windows=2, width=24, threads=1)  # of another base
    assert mean_kl(capsys.readouterr().out, "bundle fp32") > 1e-2


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama.cpp is here")
def test_an_engine_that_is_not_installed_is_named(llama_path: Path) -> None:
    with pytest.raises(
        DependencyError, match=r"llama_cpp is not installed: pip install 'chameleon-deploy\[peers-llama"
    ):
        quality.main(llama_path / "base", [], ["Q4_0"], [], text=None, windows=2, width=24, threads=1)
