"""GPT-2 medium, large and XL with random weights, weights.bin of 1.4 to 6.3 GB: `pytest -m large_models -k '[medium]'`.

Not part of CI. Two cores take 2, 4 and 7 minutes; verifying needs 2.8, 1.9 and 1.5 times the weights (4, 6 and 9 GB).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import chameleon_deploy

pytestmark = [pytest.mark.large_models, pytest.mark.timeout(7200)]

# GPT-2's own counts: https://huggingface.co/openai-community/gpt2-xl and its siblings
PARAMETERS = {"medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}


def peak_of(*arguments: object) -> int:
    """Run a module of this package. Returns its peak resident memory in bytes."""
    process = subprocess.Popen([sys.executable, "-m", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, arguments
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize("size", PARAMETERS)
def test_export_verify_load(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    peak_of("chameleon_deploy.reference.random", "--size", size, "--out", checkpoint)
    exporting = peak_of("chameleon_deploy.export", checkpoint, "--out", bundle, "--no-verify")
    verifying = peak_of("chameleon_deploy.verify", bundle, "--reference", checkpoint)  # exit 1 where a gate is missed
    weights = 4 * PARAMETERS[size]
    with capsys.disabled():
        print(f"\n{size}: export {exporting / weights:.2f} x the weights, verify {verifying / weights:.2f} x")
    assert exporting <= 1.3 * weights
    runtime = chameleon_deploy.load(bundle)
    assert runtime.manifest.parameters.base == PARAMETERS[size]
    generated = runtime.generate([[1, 2, 3], [4]], max_new_tokens=3)
    assert [len(row.token_ids) for row in generated] == [3, 3]
