"""Prints the tables of docs/lab from what `bench --json` wrote.

    python -m benchmarks.tables pretrained fp32.json int8.json
    python -m benchmarks.tables untrained fp32.json int8.json

`pretrained` is for a model with real weights, whose quality `bench` measured too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
            *map(cell, times),
        ]


def cell(time: float | None) -> str:
    """Return milliseconds in three digits or more, or nothing where there was no measurement."""
    return "" if time is None else f"{time:.1f}" if time < 100 else f"{time:.0f}"


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


def headline(figures: Mapping[str, Sequence[Path]]) -> None:
    """Print a row for each engine of each precision: quality, memory, loading, and speed with llama-bench's tests.

    figures  files of `bench --json` by kind ("steps", "pp512", "tg128", "quality"), of `loading --json` as "loading"
    """
    found = {kind: merged(files) for kind, files in figures.items() if kind != "loading"}
    loaded = dict[str, dict[str, float]]()
    for file in figures["loading"]:
        loaded |= json.loads(file.read_text())

    def row(precision: str, engine: str) -> list[str]:
        name = f"bundle {precision}" if engine == "bundle" else engine
        quality, own = found["quality"][precision]["quality"].get(engine), loaded.get(name)
        steps = [milliseconds(found["steps"][precision], engine, ("decode", batch)) for batch in (1, 8, 32)]
        return [
            f"**{name}**" if engine == "bundle" else name,
            f"{max(quality['mean_kl'], 0):.1e}" if quality else "",
            *(f"{own[size] / 1e6:,.0f}" if own else "" for size in ("size", "resident")),
            f"{own['seconds']:.1f}" if own else "",
            speed(found["pp512"][precision], engine, "prefill"),
            speed(found["tg128"][precision], engine, "decode"),
            *map(cell, steps),
        ]

    heads = ["engine", "mean KL", "files, MB", "resident, MB", "first token, s", "pp512, tokens/s", "tg128, tokens/s",
             "step of 1 row, ms", "of 8", "of 32"]  # fmt: skip
    table(heads, (
        row(precision, engine)
        for precision, own in found["steps"].items()
        for engine in ("bundle", *own["parts"]["decode", 1]["ratios"]) if engine not in ABLATIONS
    ))  # fmt: skip


def speed(own: dict[str, Any], engine: str, kind: str) -> str:
    """Return tokens per second of one row, or nothing where an engine was not measured."""
    timing = own["parts"][kind, 1]
    ratio = 1.0 if engine == "bundle" else timing["ratios"].get(engine)
    return f"{timing['part']['units'] / timing['seconds']['bundle'] / ratio:.1f}" if ratio else ""


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
