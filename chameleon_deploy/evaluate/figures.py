"""What an experiment's scores say: figures with their intervals, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chameleon_deploy.evaluate.experiment import PROTOCOLS, Scored
from chameleon_deploy.evaluate.scoring import bootstrap_change, seed_interval
from chameleon_deploy.table import Sheet

Interval = tuple[float, float]

# Group, variant, conditioning, how the table calls it. A cohort of one is mode request.
CONTROLS = (
    ("mode", "base", "none", "none"),
    ("mode", "lora", "static", "static (the trained LoRA)"),
    ("mode", "chameleon", "request", "request (cohort of 1)"),
    ("mode", "chameleon", "centroid", "centroid"),
    ("mode", "chameleon", "cohort of 32", "cohort (of 32)"),
    ("cohort", "chameleon", "cohort of 4", "cohort of 4"),
    ("cohort", "chameleon", "mixed batch of 32", "32 without clustering"),
    ("wrong", "chameleon", "another cluster's mean", "another cluster's mean"),
    ("wrong", "chameleon", "shuffled", "shuffled conditioning"),
    ("capacity", "chameleon-constant", "constant", "hypernetwork trained on a constant"),
    ("capacity", "lora-large", "static", "LoRA of equal parameter count"),
)


@dataclass(frozen=True)
class Figures:
    """One variant under one conditioning, over all seeds.

    loss                nats per scored position, mean over seeds, with its 95 % Student interval over seeds
    change              of perplexity from the base, with its 95 % bootstrap interval over texts (seeds averaged)
    beside_chameleon    perplexity relative to the hypernetwork's own in mode cohort, trained and scored alike: the mean
                        over seeds paired by seed, its interval over seeds, its interval over texts
    perplexity_by_cluster  by the clusters of the training protocol, where it is the scoring protocol too
    """

    regime: str
    trained: str
    scored: str
    conditioning: str
    parameters: int
    seeds: int
    texts: int
    positions: int
    loss: float
    loss_interval: Interval | None
    perplexity: float
    perplexity_interval: Interval | None
    change: float
    change_interval: Interval | None
    beside_chameleon: float | None
    beside_chameleon_seeds: Interval | None
    beside_chameleon_texts: Interval | None
    perplexity_by_cluster: dict[int, float]


def figures(scored: Sequence[Scored], seed: int) -> list[Figures]:
    """All figures; `seed` is the bootstrap's."""
    bases = {s.scored: s for s in scored if s.variant == "base"}
    own = {(s.trained, s.scored): s for s in scored if (s.variant, s.conditioning) == ("chameleon", "cohort of 32")}
    return [_figures(s, bases[s.scored], own[s.trained, s.scored], seed) for s in scored]


def _figures(scored: Scored, base: Scored, chameleon: Scored, seed: int) -> Figures:
    positions = scored.positions.sum()
    losses = scored.nll.sum(1) / positions
    loss, interval = float(losses.mean()), seed_interval(losses)
    mean_nll, base_nll, chameleon_nll = scored.nll.mean(0), base.nll.mean(0), chameleon.nll.mean(0)
    is_base, is_chameleon = scored is base, scored is chameleon
    differences = losses - chameleon.nll.sum(1) / positions  # the base has one row, which broadcasts
    over_seeds = seed_interval(differences)
    by_cluster = {int(c): scored.cluster_ids == c for c in np.unique(scored.cluster_ids)}
    return Figures(
        regime=scored.variant,
        trained="" if is_base else scored.trained,
        scored=scored.scored,
        conditioning=scored.conditioning,
        parameters=scored.parameters,
        seeds=len(losses),
        texts=len(scored.positions),
        positions=int(positions),
        loss=loss,
        loss_interval=interval,
        perplexity=math.exp(loss),
        perplexity_interval=_map(math.exp, interval),
        change=math.expm1(loss - float(base_nll.sum() / positions)),
        change_interval=None if is_base else bootstrap_change(mean_nll, base_nll, scored.positions, seed),
        beside_chameleon=None if is_chameleon else math.expm1(float(differences.mean())),
        beside_chameleon_seeds=None if is_chameleon else _map(math.expm1, over_seeds),
        beside_chameleon_texts=None
        if is_chameleon
        else bootstrap_change(mean_nll, chameleon_nll, scored.positions, seed),
        perplexity_by_cluster={
            c: math.exp(mean_nll[rows].sum() / scored.positions[rows].sum())
            for c, rows in by_cluster.items()
            if scored.trained == scored.scored
        },
    )


def find(all_figures: Iterable[Figures], regime: str, conditioning: str, trained: str, scored: str) -> Figures:
    """The one that is meant; the base is trained under nothing."""
    wanted = (regime, conditioning, "" if regime == "base" else trained, scored)
    return next(f for f in all_figures if (f.regime, f.conditioning, f.trained, f.scored) == wanted)


def regime_sheet(all_figures: Sequence[Figures]) -> Sheet:
    """The paper's table: three regimes, both protocols side by side."""
    headers = ["trained under", "regime", "parameters"]
    for protocol in PROTOCOLS:
        headers += [f"{protocol}: loss", "perplexity", "change [over texts]"]
    rows = []
    for trained, regime, conditioning in (
        ("", "base", "none"),
        *((p, r, c) for p in PROTOCOLS for r, c in (("lora", "static"), ("chameleon", "cohort of 32"))),
    ):
        row = [find(all_figures, regime, conditioning, trained, scored) for scored in PROTOCOLS]
        cells = [cell for f in row for cell in (_loss(f), number(f.perplexity), _change(f.change, f.change_interval))]
        rows.append([trained, regime, f"{row[0].parameters:,}", *cells])
    counts = "; ".join(f"{f.scored}: {f.positions:,} positions of {f.texts:,} texts" for f in all_figures
                       if f.regime == "base")  # fmt: skip
    return Sheet(headers, rows, f"The three regimes ({counts})", sections=[0, 2])


def control_sheet(all_figures: Sequence[Figures], protocol: str) -> Sheet:
    """All modes and controls, trained and scored under one protocol."""
    headers = ["", "conditioned on", "parameters", "loss", "perplexity", "change from base [over texts]",
               "beside cohort [over seeds]", "[over texts]"]  # fmt: skip
    rows = []
    for group, regime, conditioning, name in CONTROLS:
        f = find(all_figures, regime, conditioning, protocol, protocol)
        beside = "" if f.beside_chameleon is None else _change(f.beside_chameleon, f.beside_chameleon_seeds)
        rows.append([group, name, f"{f.parameters:,}", _loss(f), number(f.perplexity),
                     _change(f.change, f.change_interval), beside, _percents(f.beside_chameleon_texts)])  # fmt: skip
    sections = [i for i in range(len(rows) - 1) if rows[i][0] != rows[i + 1][0]]
    return Sheet(headers, rows, f"Modes and controls, protocol {protocol}", sections=sections)


def cluster_sheet(all_figures: Sequence[Figures]) -> Sheet:
    """Perplexity per cluster of the scored texts."""
    regimes = (("base", "none"), ("lora", "static"), ("chameleon", "cohort of 32"))
    shown = [find(all_figures, *regime, protocol, protocol) for protocol in PROTOCOLS for regime in regimes]
    return by_cluster([(f"{f.scored}: {f.regime}", f.perplexity_by_cluster) for f in shown])


def by_cluster(perplexities: Sequence[tuple[str, Mapping[int, float]]]) -> Sheet:
    """A row per cluster and a column per named regime."""
    clusters = sorted({cluster for _, own in perplexities for cluster in own})
    rows = [
        [f"cluster {cluster}", *(number(own[cluster]) if cluster in own else "" for _, own in perplexities)]
        for cluster in clusters
    ]
    return Sheet(["", *(name for name, _ in perplexities)], rows, "Perplexity by cluster")


def checkpoint_sheets(records: Sequence[Mapping[str, Any]], wide: bool) -> list[Sheet]:
    """The records that `evaluate --json` prints as a table of few columns and one of clusters, or as one wide table."""
    headers = ["protocol", "regime", "parameters", "perplexity", "change [95 % interval]"]
    rows = [
        [r["protocol"], r["regime"], f"{r['parameters']:,}", number(r["perplexity"]),
         _change(r["change"], r["change_interval"])]
        for r in records
    ]  # fmt: skip
    sections = [i for i in range(len(rows) - 1) if rows[i][0] != rows[i + 1][0]]
    clusters = by_cluster([(f"{r['protocol']}: {r['regime']}", r["perplexity_by_cluster"]) for r in records])
    if not wide:
        return [Sheet(headers, rows, sections=sections), clusters]
    headers += ["loss", "positions", *(name for name, *_ in clusters.rows)]
    for column, (row, record) in enumerate(zip(rows, records, strict=True), 1):
        row += [f"{record['loss']:.4f}", f"{record['positions']:,}", *(cells[column] for cells in clusters.rows)]
    return [Sheet(headers, rows, sections=sections)]


def number(value: float) -> str:
    """Four digits after the point, as the paper prints; fewer where they would mean nothing."""
    return f"{value:.4f}" if value < 1000 else f"{value:,.0f}"


def _loss(f: Figures) -> str:
    half = f" \u00b1 {(f.loss_interval[1] - f.loss_interval[0]) / 2:.4f}" if f.loss_interval else ""
    return f"{f.loss:.4f}{half}"


def _change(value: float, interval: Interval | None) -> str:
    return f"{_percent(value)} {_percents(interval)}".strip() if value or interval else ""


def _percent(value: float) -> str:
    return f"{value:+.2%}"


def _percents(interval: Interval | None) -> str:
    return f"[{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}]" if interval else ""


def _map(function: Callable[[float], float], interval: Interval | None) -> Interval | None:
    return (function(interval[0]), function(interval[1])) if interval else None
