"""Prints the tables of docs/performance.md from what `bench --json` wrote: performance_table.py fp32.json int8.json

Speed is "times faster than PyTorch eager fp32 / times faster than the better of CTranslate2 and OpenVINO".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

EAGER, FOREIGN = "PyTorch eager fp32", ("CTranslate2", "OpenVINO")
SPEED = {  # kind and batch of a part, by the name of its row
    "scoring 8x128": ("scoring", 8),
    "prefill 8x128 + first token": ("prefill", 8),
    "decode, batch 1": ("decode", 1),
    "decode, batch 8": ("decode", 8),
    "decode, batch 32": ("decode", 32),
    "prefill 8x128 + 33 tokens": ("generation", 8),
}
OVERHEAD = {
    "decode batch 8": ("decode", 8),
    "scoring": ("scoring", 8),
    "prefill 8x128 + 33 tokens": ("generation", 8),
}


def rows(record: dict[str, Any]) -> dict[str, str]:
    """The figures of one run, by the name of the row."""
    footprint = record["footprint"]

    def ratios(kind: str, batch: int) -> dict[str, float]:
        found: dict[str, float] = next(
            t["ratios"] for t in record["timings"] if (t["part"]["kind"], t["part"]["batch"]) == (kind, batch)
        )
        return found

    def overhead(kind: str, batch: int, other: str) -> str:
        return f"{1 / ratios(kind, batch)[other] - 1:+.1%}"

    found = {}
    for name, part in SPEED.items():
        own = ratios(*part)
        best = min((own[other] for other in own if other.startswith(FOREIGN)), default=float("nan"))
        found[name] = f"{own[EAGER]:.2f} / {best:.2f}"
    for name, part in OVERHEAD.items():
        found[f"adaptation overhead, {name}"] = overhead(*part, "without LoRA")
    return found | {
        "mixed call, x one call per cluster, decode batch 8": f"{ratios('decode', 8)['one call per cluster']:.2f}",
        "peak resident memory, batch 8 x (128 + 33)": f"{footprint['peak'] / 2**20:.0f} MiB",
        "private memory of a further worker, share_weights": f"{footprint['shared_private'] / 2**20:.0f} MiB",
        "load time, warm cache / with share_weights": (
            f"{footprint['load_seconds']:.2f} s / {footprint['shared_load_seconds']:.2f} s"
        ),
        "scoring against full logits, time": overhead("scoring", 8, "full logits"),
    }


def main(paths: list[str]) -> None:
    tables = {}
    for path in paths:
        record = json.loads(Path(path).read_text())
        tables[record["precision"]] = rows(record)
    print("| | " + " | ".join(tables) + " |")
    print("|---|" + "---|" * len(tables))
    for name in next(iter(tables.values())):
        print(f"| {name} | " + " | ".join(table[name] for table in tables.values()) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
