"""chameleon-run where memory runs out: one line and exit code 2, never an abort."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from pathlib import Path

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
