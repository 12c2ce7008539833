"""One worker process of `footprint.py`: load a bundle, generate, print time and memory as JSON, and wait.

It is run as a file, so that its clock starts before the package is imported.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import chameleon_deploy  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--share-weights", action="store_true")
    for option in ("--threads", "--batch", "--width", "--new-tokens"):
        parser.add_argument(option, type=int, required=True)
    options = parser.parse_args()
    runtime = chameleon_deploy.load(options.bundle, threads=options.threads, share_weights=options.share_weights)
    figures = {
        "load_seconds": time.perf_counter() - START,
        "resident": _memory("status", "VmRSS"),
        "private": _memory("smaps_rollup", "Private_Dirty"),
    }
    if options.batch:
        vocab_size = runtime.manifest.model.vocab_size
        rows = [[(31 * row + 7 * i) % vocab_size for i in range(options.width)] for row in range(options.batch)]
        runtime.generate(rows, max_new_tokens=options.new_tokens)
    print(json.dumps({**figures, "peak": _memory("status", "VmHWM")}), flush=True)
    sys.stdin.read()  # stay loaded until the parent closes the pipe


def _memory(file: str, *keys: str) -> int:
    """Return bytes, from a file of /proc/self that gives them in kB."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(keys))


if __name__ == "__main__":
    main()
