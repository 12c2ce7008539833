"""`compare --html`: the comparison as one page with plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chameleon_deploy.evaluate.experiment import Outcome
from chameleon_deploy.evaluate.figures import (
    COHORTS,
    MODES,
    REGIMES,
    Figures,
    Row,
    cluster_sheet,
    control_sheet,
    find,
    regime_sheet,
)
from chameleon_deploy.terminal.html_page import Page


def fill(page: Page, outcome: Outcome, all_figures: Sequence[Figures], settings: str) -> None:
    """Fill the page: tables, then learning curves, clusters, map, gain against cohort size and mode."""
    page.section("The three regimes")
    page.text(settings)
    page.table(regime_sheet(all_figures))
    page.text(
        "paper: the loss of the paper's scripts, the last position of the padded text against its own token. "
        "masked: the next token over real tokens. All intervals are 95 %: over seeds, Student's; "
        "over texts, a paired bootstrap."
    )
    page.section("Modes and controls")
    for protocol in reversed(outcome.protocols):
        page.table(control_sheet(all_figures, protocol))
    page.section("Learning curves")
    with page.plot("Loss of the validation texts after each epoch; one thin line per seed.") as figure:
        axes = figure.subplots(1, len(outcome.protocols), squeeze=False)[0]
        for protocol, axis in zip(outcome.protocols, axes, strict=True):
            _learning_curves(axis, outcome, protocol)
    page.section("Perplexity by cluster")
    page.table(cluster_sheet(all_figures))
    last = outcome.protocols[-1]
    with page.plot(f"Protocol {last}, mean over seeds.") as figure:
        _clusters(figure.subplots(), all_figures, last)
    page.section("Map of the text embeddings")
    with page.plot("Test texts and frozen centroids, on the first two principal components.", 6, 5) as figure:
        _map(figure.subplots(), outcome)
    page.section("Gain against cohort size and mode")
    caption = f"Change of perplexity from the base under protocol {last}, with its interval over texts."
    with page.plot(caption) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        _gains(left, all_figures, last, COHORTS, "texts per cohort")
        _gains(right, all_figures, last, MODES, "mode")
        left.set_ylabel("change of perplexity, %")


def _learning_curves(axis: Any, outcome: Outcome, protocol: str) -> None:
    regimes = [(key, runs) for key, runs in outcome.histories.items() if key[0] == protocol]
    for number, ((_, regime), runs) in enumerate(regimes):
        for i, history in enumerate(runs):
            epochs, losses = [e["epoch"] for e in history], [e["validation_loss"] for e in history]
            label = regime if i == 0 else None
            axis.plot(epochs, losses, color=f"C{number}", linewidth=1, marker=".", markersize=4, label=label)
    axis.set(title=protocol, xlabel="epoch", ylabel="loss")
    axis.legend()


def _clusters(axis: Any, all_figures: Sequence[Figures], protocol: str) -> None:
    for i, regime in enumerate(REGIMES):
        own = find(all_figures, regime.variant, regime.conditioning, protocol, protocol)
        by_cluster = own.perplexity_by_cluster
        axis.bar(np.arange(len(by_cluster)) + (i - 1) * 0.27, list(by_cluster.values()), 0.25, label=regime.label)
    axis.set_xticks(range(len(by_cluster)), [f"cluster {c}" for c in by_cluster])
    axis.set_ylabel("perplexity")
    axis.legend()


def _map(axis: Any, outcome: Outcome) -> None:
    mean = outcome.embeddings.mean(0)
    _, _, components = np.linalg.svd(outcome.embeddings - mean, full_matrices=False)
    components *= np.sign(components.sum(1))[:, None]  # a principal component has an arbitrary sign
    points, centroids = ((x - mean) @ components[:2].T for x in (outcome.embeddings, outcome.centroids))
    for cluster in range(len(centroids)):
        own, colour = points[outcome.cluster_ids == cluster], f"C{cluster % 8}"
        axis.scatter(own[:, 0], own[:, 1], s=10, color=colour, alpha=0.6, label=f"cluster {cluster}")
        axis.scatter(*centroids[cluster], s=140, color=colour, marker="X", edgecolor="black")
    axis.set(xlabel="first component", ylabel="second component")
    axis.legend()


def _gains(axis: Any, all_figures: Sequence[Figures], protocol: str, shown: Sequence[Row], label: str) -> None:
    for i, row in enumerate(shown):
        f = find(all_figures, row.variant, row.conditioning, protocol, protocol)
        low, high = f.change_interval or (f.change, f.change)
        axis.plot([i, i], [100 * low, 100 * high], color="C0", marker="_")
        axis.plot(i, 100 * f.change, "o", color="C0")
    axis.axhline(0, color="#57606a", linewidth=1)
    axis.set_xticks(range(len(shown)), [row.label for row in shown])
    axis.set_xlabel(label)
