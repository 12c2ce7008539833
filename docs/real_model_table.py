"""Prints the tables of a pretrained model from what `bench --json` wrote: real_model_table.py FILE...

Files of one precision are put together, so that a run may be split by --batch. A time is the bundle's median times the
median of the paired ratios.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = {  # kind and batch of a part, and the units of its figure, by heading
    "scoring 8x128": ("scoring", 8),
    "prefill 8x128": ("prefill", 8),
    "step, batch 1": ("decode", 1),
    "step, batch 8": ("decode", 8),
    "step, batch 32": ("decode", 32),
}
ABLATIONS = ("full logits", "one call per cluster", "without LoRA")
LLAMA = "llama.cpp"


def merged(files: list[str]) -> dict[str, dict[str, Any]]:
    """Return the quality and the ratios by part of every precision; the first file that has a part gives it."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        record = json.loads(Path(file).read_text())
        own = found.setdefault(record["precision"], {"quality": {}, "parts": {}})
        own["quality"] = own["quality"] or record["quality"]
        for timing in record["timings"]:
            own["parts"].setdefault((timing["part"]["kind"], timing["part"]["batch"]), timing)
    return found


def milliseconds(own: dict[str, Any], engine: str, part: tuple[str, int]) -> float | None:
    """Return the time of the whole part, or of a step."""
    timing = own["parts"].get(part)
    if timing is None or (engine != "bundle" and engine not in timing["ratios"]):
        return None
    steps = timing["part"]["units"] if part[0] == "decode" else 1
    return float(1e3 * timing["seconds"]["bundle"] / steps * (1 if engine == "bundle" else timing["ratios"][engine]))


def engine_rows(precision: str, own: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row per engine: quality, size and times."""
    for engine, quality in own["quality"].items():
        name = f"**bundle {precision}**" if engine == "bundle" else engine
        times = [milliseconds(own, engine, part) for part in COLUMNS.values()]
        yield [
            name,
            f"{max(quality['mean_kl'], 0):.1e}",
            f"{quality['p999_kl']:.1e}",
            f"{quality['top1']:.3f}",
            f"{quality['perplexity']:.3f}",
            f"{quality['size'] / 1e6:.0f}",
            *("" if time is None else f"{time:.1f}" if time < 100 else f"{time:.0f}" for time in times),
        ]


def ratio_rows(own: dict[str, Any], precision: str) -> Iterator[list[str]]:
    """Yield a row per part: how many times faster the bundle is than its best peers, and the cost of adapting."""
    for heading, part in COLUMNS.items():
        ratios = own["parts"].get(part, {"ratios": {}})["ratios"]
        peers = {name: ratio for name, ratio in ratios.items() if name not in ABLATIONS}
        same = {name: r for name, r in peers.items() if precision in name}
        llama = {name: r for name, r in peers.items() if name.startswith(LLAMA)}
        adapting = f"{1 / ratios['without LoRA'] - 1:+.1%}" if "without LoRA" in ratios else ""
        eager = {name: r for name, r in peers.items() if name.startswith("PyTorch eager")}
        yield [heading, best(same), best(llama), best(eager), adapting]


def best(ratios: dict[str, float]) -> str:
    if not ratios:
        return ""
    name = min(ratios, key=lambda one: ratios[one])
    return f"{ratios[name]:.2f} ({name})"


def table(headers: list[str], rows: Iterator[list[str]]) -> None:
    print("| " + " | ".join(headers) + " |")
    print("|---" * len(headers) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main(files: list[str]) -> None:
    found = merged(files)
    headers = ["engine", "mean KL", "99.9th percentile", "same best token", "perplexity", "MB",
               *(f"{heading}, ms" for heading in COLUMNS)]  # fmt: skip
    table(headers, (row for precision, own in found.items() for row in engine_rows(precision, own)))
    for precision, own in found.items():
        compared = [f"{precision}: times faster than", f"the best {precision} peer", LLAMA, "PyTorch eager fp32"]
        table([*compared, "adapting costs"], ratio_rows(own, precision))


if __name__ == "__main__":
    main(sys.argv[1:])
