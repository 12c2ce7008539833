"""`make demo`: run the tiny model from checkpoint to text and measure every claim."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

import chameleon_deploy
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.table import Sheet

PROMPTS = {
    "prose": "The following expression is evaluated",
    "code": "def __init__(self, name, value):\n    self.",
    "docstring": "Return a list of all the",
    "changelog": "- Patch #",
}
HELD_OUT_PER_KIND = 24


def main(
    models: Annotated[Path, typer.Option(help="Directory that holds tiny/.")] = Path("models"),
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Export the tiny checkpoint, verify it, generate text, compare the regimes and time it."""
    started = time.perf_counter()
    with console.stderr.status("importing PyTorch and transformers"):
        from chameleon_deploy.export.exporter import Publication, export_bundle
        from chameleon_deploy.reference.checkpoint import load_checkpoint
        from chameleon_deploy.verify.gates import require_passed
        from chameleon_deploy.verify.report import check_sheet
        from chameleon_deploy.verify.run import VerifyOptions, summary, verify_bundle

    out = models / "demo"
    shutil.rmtree(out, ignore_errors=True)
    checkpoints = {regime: load_checkpoint(models / "tiny" / regime) for regime in ("chameleon", "lora")}

    _heading("1. Export and verify", "every figure against the PyTorch reference")
    with console.progress() as report:
        for regime, checkpoint in checkpoints.items():

            def gates(directory: Path, checkpoint: Any = checkpoint, regime: str = regime) -> Any:
                checks, record = verify_bundle(
                    directory, checkpoint, report, VerifyOptions(threads=threads, quick=regime == "lora")
                )
                if regime == "chameleon" or not record["verified"]:
                    console.show(check_sheet(checks))
                require_passed(checks)
                return summary(checks), record

            export_bundle(checkpoint, out / regime, Publication(gates))
    runtimes = {regime: chameleon_deploy.load(out / regime, threads=threads) for regime in checkpoints}

    _heading("2. Generate", "one batch, mode cohort: prompts of one cluster share generated factors")
    sampling = chameleon_deploy.Sampling(temperature=0.7, top_p=0.9, seed=1)
    generations = runtimes["chameleon"].generate(list(PROMPTS.values()), max_new_tokens=48, sampling=sampling)
    rows = [
        [kind, str(g.cluster_id), prompt, g.text]
        for (kind, prompt), g in zip(PROMPTS.items(), generations, strict=True)
    ]
    console.show(Sheet(["kind", "cluster", "prompt", "text"], rows, sections=range(len(rows))))

    _heading("3. Held-out perplexity", "text that training never saw; bundle and PyTorch")
    with console.progress() as report:
        console.show(_perplexities(runtimes, checkpoints, report))

    _heading("4. Speed", f"{threads} threads, interleaved, medians")
    from chameleon_deploy.bench.report import print_tables
    from chameleon_deploy.bench.run import Plan, run

    with console.progress() as report:
        plan = Plan(threads, [1, 8], width=64, num_tokens=17, rounds=5, max_extra_rounds=0, foreign=False)
        measured = run(out / "chameleon", checkpoints["chameleon"], plan, report)
    print_tables(measured)
    console.stdout.print(f"\nBundles are in {out}. The demo took {time.perf_counter() - started:.0f} s.")


def _perplexities(runtimes: Any, checkpoints: Any, report: Progress) -> Sheet:
    from chameleon_deploy.evaluate.scoring import evaluate
    from chameleon_deploy.reference.tiny import corpus_splits

    texts = {kind: split.test[:HELD_OUT_PER_KIND] for kind, split in corpus_splits().items() if split.test}
    headers = ["regime", "trained parameters", *texts, "all", "all, PyTorch", "difference"]
    rows = []
    regimes = (("base", "chameleon", "none"), ("lora", "lora", "static"), ("chameleon", "chameleon", "cohort"))
    with TemporaryDirectory() as cache:
        everything = [text for kind in texts.values() for text in kind]
        for done, (name, regime, mode) in enumerate(regimes):
            report("perplexity", done, len(regimes))
            runtime, checkpoint = runtimes[regime], checkpoints[regime]
            cells = [_perplexity(runtime, checkpoint, kept, mode) for kept in [*texts.values(), everything]]
            reference = evaluate(checkpoint, everything, Path(cache), adapted=mode != "none")
            trained = f"{reference.parameters:,}" if mode != "none" else "0"
            rows.append([name, trained, *(f"{c:.2f}" for c in cells), f"{reference.perplexity:.2f}",
                         f"{abs(cells[-1] / reference.perplexity - 1):.1e}"])  # fmt: skip
    return Sheet(headers, rows)


def _perplexity(runtime: Any, checkpoint: Any, texts: list[str], mode: str) -> float:
    from chameleon_deploy.evaluate.scoring import cohort_rows

    ids, cohorts = cohort_rows(checkpoint, texts)
    logprobs = [
        value
        for rows in cohorts
        for score in runtime.score([ids[row] for row in rows], mode=mode)
        for value in score.token_logprobs
    ]
    return float(np.exp(-np.mean(logprobs)))


def _heading(title: str, detail: str) -> None:
    console.stdout.print(f"\n{title}: {detail}", style="bold")


if __name__ == "__main__":
    console.run(main)
