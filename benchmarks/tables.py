"""Prints the tables of docs/lab from what `bench --json` wrote.

    python -m benchmarks.tables pretrained fp32.json int8.json
    python -m benchmarks.tables untrained fp32.json int8.json

`pretrained` is for a model with real weights, whose quality `bench` measured too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chameleon_deploy.terminal import console

app = typer.Typer(**console.SETTINGS)

COLUMNS = {  # kind and batch of a part, and the units of its figure, by heading
    "scoring 8x128": ("scoring", 8),
    "prefill 8x128": ("prefill", 8),
    "step, batch 1": ("decode", 1),
    "step, batch 8": ("decode", 8),
    "step, batch 32": ("decode", 32),
}
ABLATIONS = ("full logits", "one call per cluster", "without LoRA")
LLAMA = "llama.cpp"
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


def merged(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the quality and the ratios by part of every precision; the first file that has a part gives it."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        record = json.loads(file.read_text())
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


def table(headers: list[str], rows: Iterable[list[str]]) -> None:
    print("| " + " | ".join(headers) + " |")
    print("|---" * len(headers) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


Files = Annotated[list[Path], typer.Argument(help="What `bench --json` wrote.")]


@app.command()
def pretrained(files: Files) -> None:
    """Print quality, size and times of every engine, then how many times faster the bundle is.

    Files of one precision are put together, so that a run may be split by --batch. A time is the bundle's median times
    the median of the paired ratios.
    """
    found = merged(files)
    headers = ["engine", "mean KL", "99.9th percentile", "same best token", "perplexity", "MB",
               *(f"{heading}, ms" for heading in COLUMNS)]  # fmt: skip
    table(headers, (row for precision, own in found.items() for row in engine_rows(precision, own)))
    for precision, own in found.items():
        compared = [f"{precision}: times faster than", f"the best {precision} peer", LLAMA, "PyTorch eager fp32"]
        table([*compared, "adapting costs"], ratio_rows(own, precision))


def llama_bench(prompts: Sequence[Path], steps: Sequence[Path]) -> None:
    """Print tokens per second in llama-bench's terms, a row for each engine of each precision.

    prompts, steps  what `bench --json` wrote of a prompt of 512 tokens, and of 128 tokens after a short one
    """
    found = dict[str, list[str]]()
    for place, (kind, files) in enumerate((("prefill", prompts), ("decode", steps))):
        for precision, own in merged(files).items():
            timing = own["parts"][kind, 1]
            speed = timing["part"]["units"] / timing["seconds"]["bundle"]
            speeds = {f"**bundle {precision}**": speed}
            speeds |= {name: speed / ratio for name, ratio in timing["ratios"].items() if name not in ABLATIONS}
            for name, value in speeds.items():
                found.setdefault(name, ["", ""])[place] = f"{value:.1f}"
    table(["engine", "pp512, tokens/s", "tg128, tokens/s"], ([name, *row] for name, row in found.items()))


def loading(files: Sequence[Path]) -> None:
    """Print what `loading --json` wrote: a row for each engine of each precision."""
    heads = ["engine", "import to first token, s", "resident, MB", "peak, MB", "files, MB"]
    table(heads, (
        [name, f"{one['seconds']:.2f}", *(f"{one[size] / 1e6:.0f}" for size in ("resident", "peak", "size"))]
        for file in files for name, one in json.loads(file.read_text()).items()
    ))  # fmt: skip


def untrained_rows(record: dict[str, Any]) -> dict[str, str]:
    """Return the figures of one run, by the name of the row."""
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


@app.command()
def untrained(files: Files) -> None:
    """Print speed and memory of a model with random weights, a column per precision.

    Speed is "times faster than PyTorch eager fp32 / times faster than the better of CTranslate2 and OpenVINO".
    """
    records = [json.loads(file.read_text()) for file in files]
    columns = {record["precision"]: untrained_rows(record) for record in records}
    names = next(iter(columns.values()))
    table(["", *columns], ([name, *(column[name] for column in columns.values())] for name in names))


if __name__ == "__main__":
    console.run(app)
