"""`python -m chameleon_deploy.bench`: measure a bundle against the PyTorch reference."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from chameleon_deploy import console
from chameleon_deploy.console import CheckFailedError
from chameleon_deploy.measurement import Case, LoadFigures, Timing, measure, measure_load

if TYPE_CHECKING:
    from chameleon_deploy.reference.checkpoint import Checkpoint
    from chameleon_deploy.runtime import Runtime

TOLERANCE = 5e-4  # of logits and log-probabilities, as in `verify`


def cases(runtime: Runtime, checkpoint: Checkpoint, batch_sizes: Sequence[int], width: int, steps: int) -> list[Case]:
    """Scoring and prefill of `width` tokens at the largest batch; `steps` decoding steps after them at every batch."""
    import torch

    from chameleon_deploy.reference import inference
    from chameleon_deploy.verify import verification_rows

    stream = verification_rows(checkpoint, None)[-1]
    largest = max(batch_sizes)
    # Each row is another stretch of the text, so that a batch has several clusters.
    rows = [[stream[(i * 37 + j) % len(stream)] for j in range(width)] for i in range(largest)]

    def score_reference() -> Any:
        adaptation = inference.adapt(checkpoint, rows, runtime.mode)
        with torch.no_grad():
            logprobs = _logits(checkpoint, adaptation, torch.tensor(rows), None)[0][:, :-1].log_softmax(-1)
        return logprobs.gather(2, torch.tensor(rows)[:, 1:, None])[..., 0].numpy()

    def score_ours() -> Any:
        return np.array([score.token_logprobs for score in runtime.score(rows)])

    found = [
        Case(f"scoring {largest}x{width}", score_ours, score_reference, _difference, largest * width, "token"),
        _prefill_case(runtime, checkpoint, rows),
    ]
    return found + [_decode_case(runtime, checkpoint, rows[:batch], steps) for batch in batch_sizes]


def _prefill_case(runtime: Runtime, checkpoint: Checkpoint, rows: list[list[int]]) -> Case:
    import torch

    from chameleon_deploy.reference import inference

    def ours() -> Any:
        return runtime.decoder.prefill(rows, runtime.adapt(rows), len(rows[0]))[0]

    def reference() -> Any:
        from transformers import DynamicCache

        adaptation = inference.adapt(checkpoint, rows, runtime.mode)
        with torch.no_grad():
            return _logits(checkpoint, adaptation, torch.tensor(rows), DynamicCache(), last=True)[0][:, -1].numpy()

    name = f"prefill {len(rows)}x{len(rows[0])} + first token"
    return Case(name, ours, reference, _difference, len(rows) * len(rows[0]), "token")


def _decode_case(runtime: Runtime, checkpoint: Checkpoint, rows: list[list[int]], steps: int) -> Case:
    import torch
    from transformers import DynamicCache

    from chameleon_deploy.reference import inference

    ours_adaptation, reference_adaptation = runtime.adapt(rows), inference.adapt(checkpoint, rows, runtime.mode)
    width = len(rows[0])
    _, cache = runtime.decoder.prefill(rows, ours_adaptation, width + steps)
    lengths = cache.lengths
    reference_cache = DynamicCache()
    checkpoint.trunk.hidden_states(torch.tensor(rows), None, reference_cache)
    tokens = np.array(rows)[:, :steps]  # fed to both engines, whatever they would choose

    def ours() -> Any:
        cache.lengths = lengths  # the shared buffer is written over from here
        for step in range(steps):
            logits = runtime.decoder.step(tokens[:, step], ours_adaptation, cache)
            logits.argmax(1)
        return logits.copy()

    def reference() -> Any:
        with torch.no_grad():
            for step in range(steps):
                ids = torch.from_numpy(tokens[:, step : step + 1])
                logits, _ = _logits(checkpoint, reference_adaptation, ids, reference_cache)
                logits.argmax(-1)
        reference_cache.crop(-steps)
        return logits[:, -1].numpy()

    name = f"decoding, batch {len(rows)}, past {len(rows[0])}"
    return Case(name, ours, reference, _difference, steps, "step")


def _logits(checkpoint: Checkpoint, adaptation: Any, input_ids: Any, cache: Any, last: bool = False) -> tuple[Any, Any]:
    from chameleon_deploy.reference.model import adapted_logits

    hidden, cache = checkpoint.trunk.hidden_states(input_ids, None, cache)
    hidden = hidden[:, -1:] if last else hidden
    logits = adapted_logits(
        hidden, checkpoint.trunk.head_weight, adaptation.lora_A, adaptation.lora_B, checkpoint.config.alpha,
        adaptation.factor_ids,
    )  # fmt: skip
    return logits, cache


def _difference(ours: Any, reference: Any) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(reference)).max())


def timing_table(timings: list[Timing]) -> Table:
    table = Table("", "bundle", "PyTorch eager", "times faster", "spread", "rounds", "max difference")
    for t in timings:
        scale = 1e3 / t.units
        table.add_row(t.name, f"{t.ours * scale:.3f} ms/{t.unit}", f"{t.reference * scale:.3f} ms/{t.unit}",
                      f"{t.ratio:.2f}", f"{t.ours_spread:.0%} / {t.reference_spread:.0%}", str(t.rounds),
                      f"{t.difference:.1e}")  # fmt: skip
    return table


def run(
    bundle: Path, checkpoint: Checkpoint, threads: int, batch_sizes: Sequence[int], width: int, steps: int, rounds: int,
    report: Any,
) -> tuple[list[Timing], LoadFigures, int]:  # fmt: skip
    """All timings, the figures of loading, and the bundle's weights in bytes."""
    import torch

    import chameleon_deploy

    loading = measure_load(bundle, threads, min(rounds, 3))
    torch.set_num_threads(threads)
    runtime = chameleon_deploy.load(bundle, threads=threads)
    width = min(width, runtime.manifest.model.max_positions - steps)
    found = cases(runtime, checkpoint, batch_sizes, width, steps)
    timings = [measure(case, rounds, report) for case in found]
    return timings, loading, runtime.manifest.files[runtime.manifest.token_embedding.file].size


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    reference: Annotated[Path, typer.Option(help="The checkpoint that the bundle was exported from.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, where the checkpoint's own reference has moved.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of both engines; all cores unless given.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes to decode at.")] = None,
    width: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Decoding steps per sample.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Samples per engine, doubled or tripled where they scatter.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time a bundle and its reference in turn. Exit 1 when their results differ."""
    from chameleon_deploy.reference.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(reference, base)
    threads = threads or os.cpu_count() or 1
    with console.progress() as report:
        timings, loading, weights = run(bundle, checkpoint, threads, batch or [1, 8], width, steps, rounds, report)
    console.stdout.print(timing_table(timings))
    console.stdout.print(
        f"{threads} threads. Loading in a fresh process: {loading.seconds:.2f} s, {loading.resident / 1e6:.0f} MB "
        f"resident ({loading.resident / weights:.2f} x the weights), "
        f"{loading.resident_after_generating / 1e6:.0f} MB after generating, peak {loading.peak / 1e6:.0f} MB"
    )
    if json_file:
        record = {"threads": threads, "weights_bytes": weights, "load": asdict(loading),
                  "timings": [{**asdict(t), "ratio": t.ratio} for t in timings]}  # fmt: skip
        json_file.write_text(json.dumps(record, indent=2) + "\n")
    wrong = [t.name for t in timings if not t.difference <= TOLERANCE]
    if wrong:
        raise CheckFailedError(f"results differ by more than {TOLERANCE:g}: {', '.join(wrong)}")


if __name__ == "__main__":
    console.run(main)
