"""`evaluate --table`: run the experiment, print what came out."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict
from pathlib import Path

from chameleon_deploy import console
from chameleon_deploy.evaluate import page as comparison_page
from chameleon_deploy.evaluate.experiment import PROTOCOLS, run_experiment
from chameleon_deploy.evaluate.figures import cluster_sheet, control_sheet, figures, regime_sheet
from chameleon_deploy.evaluate.variants import Experiment
from chameleon_deploy.html_page import Page
from chameleon_deploy.reference.model import load_trunk


def run_comparison(
    base: str,
    train_texts: list[str],
    scored_texts: list[str],
    settings: Experiment,
    num_seeds: int,
    work: Path,
    as_json: bool,
    html: Path | None,
) -> None:
    """Train, score and print; the same arguments on the same `work` go on where a killed run was, or print again."""
    started = time.perf_counter()
    page = Page(f"Base, LoRA and hypernetwork on {Path(base).name}") if html else None
    trunk = load_trunk(base)
    with console.progress() as report:
        outcome = run_experiment(trunk, base, train_texts, scored_texts, settings, num_seeds, work, report)
    all_figures = figures(outcome.scored, settings.seed)
    made_of = (
        f"rank {settings.rank}, alpha {settings.alpha:g}, {settings.num_clusters} clusters, batches of "
        f"{settings.batch_size}, at most {settings.max_length} tokens, learning rate {settings.lr:g}, at most "
        f"{settings.epochs} epochs, {num_seeds} seeds from {settings.seed}; {len(train_texts):,} training texts "
        f"({outcome.train_positions:,} positions, masked), {len(scored_texts):,} scored texts"
    )
    if page and html:
        comparison_page.fill(page, outcome, all_figures, made_of)
        page.write(html)
    if as_json:
        for f in all_figures:
            print(json.dumps(asdict(f)))
    else:
        console.stdout.print(made_of)
        console.show(regime_sheet(all_figures), *(control_sheet(all_figures, p) for p in reversed(PROTOCOLS)),
                     cluster_sheet(all_figures))  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    console.stderr.print(f"{time.perf_counter() - started:.0f} s, peak resident memory {peak:.2f} GB")
