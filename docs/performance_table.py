"""The table of docs/performance.md from what `bench --json` wrote: performance_table.py fp32.json int8.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

EAGER, FOREIGN = "PyTorch eager", ("CTranslate2", "OpenVINO")

# What is asked of each precision: against eager, and against the best of CTranslate2 and OpenVINO.
SPEED = {
    "scoring 8x128": {"fp32": (1.35, 1.05), "int8": (3.3, 1.4)},
    "prefill 8x128 + first token": {"fp32": (1.25, 1.0), "int8": (2.8, 1.05)},
    "decode, batch 1": {"fp32": (1.9, 1.15), "int8": (5.5, 1.7)},
    "decode, batch 8": {"fp32": (2.3, 1.15), "int8": (5.0, 1.6)},
    "decode, batch 32": {"fp32": (2.3, 1.15), "int8": (5.0, 1.6)},
    "prefill 8x128 + 33 tokens": {"fp32": (1.85, 1.2), "int8": (4.2, 1.8)},
}


def rows(record: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What was measured and what is asked, by the name of the row."""
    precision, footprint = record["precision"], record["footprint"]
    int8 = precision == "int8"

    def timing(name: str) -> dict[str, Any]:
        return next(t for t in record["timings"] if f"{t['part']['name']},".startswith(f"{name},"))

    def overhead(name: str, other: str) -> str:
        return f"{1 / timing(name)['ratios'][other] - 1:+.1%}"

    found = {}
    for name, targets in SPEED.items():
        ratios = timing(name)["ratios"]
        best = min((ratios[other] for other in ratios if other.startswith(FOREIGN)), default=float("nan"))
        eager_target, best_target = targets[precision]
        found[f"{name}, x eager / x best of CTranslate2 and OpenVINO"] = (
            f"{ratios[EAGER]:.2f} / {best:.2f}", f"{eager_target:g} / {best_target:g}",
        )  # fmt: skip
    whole = "prefill 8x128 + 33 tokens"
    single = timing("decode, batch 1")
    memory = (footprint["peak_full_logits"] - footprint["peak_scoring"]) / 2**20
    return found | {
        "adaptation overhead, decode batch 8": (overhead("decode, batch 8", "without LoRA"), "2 %" if int8 else "1 %"),
        "adaptation overhead, scoring": (overhead("scoring 8x128", "without LoRA"), "5 %" if int8 else "3 %"),
        f"adaptation overhead, {whole}": (overhead(whole, "without LoRA"), "4 %" if int8 else "2.5 %"),
        "mixed call, x one call per cluster, decode batch 8": (
            f"{timing('decode, batch 8')['ratios']['one call per cluster']:.2f}", "2.0" if int8 else "2.5",
        ),
        "peak resident memory, batch 8 x (128 + 33)": (
            f"{footprint['peak'] / 2**20:.0f} MiB", "440 MiB" if int8 else "800 MiB",
        ),
        "private memory of a further worker, share_weights": (
            f"{footprint['shared_private'] / 2**20:.0f} MiB", "60 MiB",
        ),
        "load time, warm cache / with share_weights": (
            f"{footprint['seconds']:.2f} s / {footprint['shared_seconds']:.2f} s", "0.5 s" if int8 else "0.9 s",
        ),
        "share of the floor, decode batch 1": (
            f"{single['share']:.0%}", "70 %" if int8 else "85 %",
        ),
        "scoring against full logits, time": (overhead("scoring 8x128", "full logits"), "+5 %" if int8 else "+2 %"),
        "scoring against full logits, peak memory": (f"{-memory:+.0f} MiB", "-180 MiB" if int8 else "-250 MiB"),
    }  # fmt: skip


def main(paths: list[str]) -> None:
    tables = {}
    for path in paths:
        record = json.loads(Path(path).read_text())
        tables[record["precision"]] = rows(record)
    print("| | " + " | ".join(f"{precision} | asked" for precision in tables) + " |")
    print("|---|" + "---|---|" * len(tables))
    for name in next(iter(tables.values())):
        print(f"| {name} | " + " | ".join(" | ".join(table[name]) for table in tables.values()) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
