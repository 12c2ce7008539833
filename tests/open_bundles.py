"""`python -m tests.open_bundles`: open and run the bundle of each line of standard input.

Prints for each: the error's code or `ok`, and how many bytes the process grew by at most. The C++ counterpart is
runtime/tests/open_bundles.cpp.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

import chameleon_deploy
from chameleon_deploy import Adapt, Generate
from chameleon_deploy.errors import ChameleonError


def outcome(path: str) -> str:
    try:
        runtime = chameleon_deploy.load(path, threads=1)
        texts, size = ["The river", "x"], runtime.manifest.adaptation.conditioning_size
        adapt = Adapt(conditioning=np.ones((len(texts), size)) if size else None)
        runtime.generate(texts, Generate(max_new_tokens=3), adapt)
        runtime.score(texts, Adapt(adapt_text="answer like a lawyer") if runtime.encoder else adapt)
    except ChameleonError as error:
        return error.code
    except BaseException as error:  # a panic of a Rust library is no Exception
        return f"foreign:{type(error).__name__}"
    return "ok"


def resident(field: str) -> int:
    """VmRSS, or VmHWM: the largest since the last write to clear_refs."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])


def main() -> None:
    for line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        code = outcome(line.rstrip("\n"))
        print(code, resident("VmHWM") - before, flush=True)


if __name__ == "__main__":
    main()
