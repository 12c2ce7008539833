"""chameleon-run: where memory runs out, one line and exit code 2, never an abort; and int8 on another processor."""

from __future__ import annotations

import json
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chameleon_deploy import inspect
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.runtime.decode.session import exact_weights
from tests.cpp.c_interface import BUILD
from tests.shared_data import good_bundle

GIB = 2**30


def test_a_cache_that_does_not_fit_into_memory_is_one_line(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(good_bundle("chameleon_masked"), bundle)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["model"]["max_positions"] = 2**31 - 1
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    result = subprocess.run(
        [BUILD / "chameleon-run", "generate", bundle, "--prompt", "The river", "--max-new-tokens", "2000000000"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB)),
    )
    assert result.returncode == 2
    assert re.fullmatch(r"error: no memory for a cache of .*\[text_too_long\]\n", result.stderr)


def test_inspect_says_what_python_says(mini_bundles: dict[str, Path]) -> None:
    for name, weights in (("int8", exact_weights()), ("chameleon", None)):
        found = inspected(mini_bundles[name])
        theirs = inspect.record(open_bundle(mini_bundles[name]))
        assert found["integer_weights"] == theirs["integer_weights"] == weights
        assert (found["digest"], found["precision"]) == (theirs["digest"], theirs["precision"])


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("qemu-x86_64") is None, reason="needs qemu-user on x86-64"
)
def test_int8_on_a_processor_with_avx2_and_without_vnni(mini_bundles: dict[str, Path], tmp_path: Path) -> None:
    """An emulated Haswell. Saturated sums would change these log-probabilities by more than 1e-2."""
    haswell = ("qemu-x86_64", "-cpu", "Haswell")
    texts = tmp_path / "texts.txt"
    texts.write_text("the sums\n\nof a processor without\n\nVNNI are exact as well")
    bundle = mini_bundles["int8"]
    assert inspected(bundle, haswell)["integer_weights"] == "uint8"
    here, there = (
        [
            json.loads(line)
            for line in output("score", bundle, "--text", texts, "--json", emulator=emulator).splitlines()
        ]
        for emulator in ((), haswell)
    )
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_allclose(ours["token_logprobs"], theirs["token_logprobs"], atol=1e-3)


def inspected(bundle: Path, emulator: Sequence[str] = ()) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output("inspect", bundle, "--json", emulator=emulator))
    return found


def output(*words: str | Path, emulator: Sequence[str] = ()) -> str:
    """What chameleon-run prints."""
    return subprocess.run(
        [*emulator, BUILD / "chameleon-run", *words], check=True, capture_output=True, text=True
    ).stdout
