"""Decoding speed of the C++ and the Python runtime, interleaved: `python -m tests.cpp.bench BUNDLE [--rounds N]`.

Both continue the same token ids greedily in mode centroid; a figure is the median time of a step. The rounds take
turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from tests.cpp.c_interface import BUILD

TOKENS = 64


def python_step(bundle: Path, batch: int) -> float:
    import chameleon_deploy

    runtime = chameleon_deploy.load(bundle, mode="centroid")
    vocab_size = runtime.manifest.model.vocab_size
    rows = [[(997 * i + 31 * row + 5) % vocab_size for i in range(16)] for row in range(batch)]
    tokens = runtime.stream(rows, max_new_tokens=TOKENS)
    times = [time.perf_counter() for token in tokens if token.row == batch - 1]
    return 1e3 * median(end - start for start, end in pairwise(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python-step", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.python_step:
        print(python_step(arguments.bundle, arguments.python_step))
        return
    for batch in (1, 8):
        python, native, outside = [], [], []
        for _ in range(arguments.rounds):
            this = [sys.executable, "-m", "tests.cpp.bench", str(arguments.bundle), "--python-step", str(batch)]
            python.append(float(subprocess.run(this, check=True, capture_output=True, text=True).stdout))
            program = [
                str(BUILD / "tests" / "chameleon_bench"),
                "decode",
                str(arguments.bundle),
                str(batch),
                str(TOKENS),
            ]
            record = json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
            native.append(record["ms_per_step"])
            outside.append(record["microseconds_outside_run"])
        print(
            f"batch {batch}: C++ {median(native):.2f} ms, Python {median(python):.2f} ms per step "
            f"({median(python) / median(native):.3f}x); outside Session::Run {median(outside):.0f} us "
            f"({0.1 * median(outside) / median(native):.2f} %)"
        )


if __name__ == "__main__":
    main()
