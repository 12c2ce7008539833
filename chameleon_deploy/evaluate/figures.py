"""Figures of an experiment with their intervals, and tables of them. The display names of all rows are defined here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from chameleon_deploy.evaluate.experiment import Scored
from chameleon_deploy.evaluate.scoring import bootstrap_change, seed_interval
from chameleon_deploy.evaluate.variants import ConditioningName
from chameleon_deploy.terminal.table import Sheet

Interval = tuple[float, float]


class Row(NamedTuple):
    """A variant under one conditioning, and the display name of the two."""

    variant: str
    conditioning: ConditioningName
    label: str


# The paper's regimes.
REGIMES = (Row("base", "none", "base"), Row("lora", "static", "lora"), Row("chameleon", "cohort_32", "chameleon"))
# All rows of a table of modes and controls, by group. A cohort of one is mode request.
CONTROLS: dict[str, tuple[Row, ...]] = {
    "mode": (
        Row("base", "none", "none"),
        Row("lora", "static", "static (the trained LoRA)"),
        Row("chameleon", "request", "request (cohort of 1)"),
        Row("chameleon", "centroid", "centroid"),
        Row("chameleon", "cohort_32", "cohort (of 32)"),
    ),
    "cohort": (
        Row("chameleon", "cohort_4", "cohort of 4"),
        Row("chameleon", "mixed_32", "32 without clustering"),
    ),
    "wrong": (
        Row("chameleon", "other_cluster", "another cluster's mean"),
        Row("chameleon", "shuffled", "shuffled conditioning"),
    ),
    "capacity": (
        Row("chameleon-constant", "constant", "hypernetwork trained on a constant"),
        Row("lora-large", "static", "LoRA of equal parameter count"),
    ),
}
# The two plots of gains: short names for an axis.
COHORTS = (
    Row("chameleon", "request", "1"),
    Row("chameleon", "cohort_4", "4"),
    Row("chameleon", "cohort_32", "32"),
    Row("chameleon", "mixed_32", "32, mixed"),
)
MODES = (
    Row("lora", "static", "static"),
    Row("chameleon", "request", "request"),
    Row("chameleon", "centroid", "centroid"),
    Row("chameleon", "cohort_32", "cohort"),
)


@dataclass(frozen=True)
class Figures:
    """One variant under one conditioning, over all seeds.

    loss                   nats per scored position, mean over seeds, with its 95 % Student interval over seeds
    change                 of perplexity from the base, with its 95 % bootstrap interval over texts (seeds averaged)
    beside_chameleon       perplexity relative to the hypernetwork's own in mode cohort, trained and scored alike: the
                           mean over seeds paired by seed, its interval over seeds, its interval over texts
    perplexity_by_cluster  by the clusters of the training protocol, if it is the scoring protocol too
    """

    regime: str
    trained: str
    scored: str
    conditioning: ConditioningName
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
    """Return all figures; `seed` is the bootstrap's."""
    bases = {s.scored: s for s in scored if s.variant == "base"}
    own = {(s.trained, s.scored): s for s in scored if (s.variant, s.conditioning) == ("chameleon", "cohort_32")}
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


def find(
    all_figures: Iterable[Figures], variant: str, conditioning: ConditioningName, trained: str, scored: str
) -> Figures:
    """Return the figures of one variant and conditioning; the base is trained under no protocol."""
    wanted = (variant, conditioning, "" if variant == "base" else trained, scored)
    return next(f for f in all_figures if (f.regime, f.conditioning, f.trained, f.scored) == wanted)


def protocols_of(all_figures: Iterable[Figures]) -> list[str]:
    """Return the protocols under which texts were scored."""
    return list(dict.fromkeys(f.scored for f in all_figures))


def regime_sheet(all_figures: Sequence[Figures]) -> Sheet:
    """Return the paper's table: three regimes, with the protocols as columns."""
    headers, protocols = ["trained under", "regime", "parameters"], protocols_of(all_figures)
    for protocol in protocols:
        headers += [f"{protocol}: loss", "perplexity", "change [over texts]"]
    rows = []
    base, *trained_regimes = REGIMES
    for trained, regime in (("", base), *((protocol, r) for protocol in protocols for r in trained_regimes)):
        row = [find(all_figures, regime.variant, regime.conditioning, trained, scored) for scored in protocols]
        cells = [cell for f in row for cell in (_loss(f), number(f.perplexity), _change(f.change, f.change_interval))]
        rows.append([trained, regime.label, f"{row[0].parameters:,}", *cells])
    counts = "; ".join(f"{f.scored}: {f.positions:,} positions of {f.texts:,} texts" for f in all_figures
                       if f.regime == "base")  # fmt: skip
    return Sheet(headers, rows, f"The three regimes ({counts})", sections=[0, 2])


def control_sheet(all_figures: Sequence[Figures], protocol: str) -> Sheet:
    """Return all modes and controls, trained and scored under one protocol."""
    headers = ["", "conditioned on", "parameters", "loss", "perplexity", "change from base [over texts]",
               "beside cohort [over seeds]", "[over texts]"]  # fmt: skip
    rows = []
    for group, control in ((group, row) for group, controls in CONTROLS.items() for row in controls):
        f = find(all_figures, control.variant, control.conditioning, protocol, protocol)
        beside = "" if f.beside_chameleon is None else _change(f.beside_chameleon, f.beside_chameleon_seeds)
        rows.append([group, control.label, f"{f.parameters:,}", _loss(f), number(f.perplexity),
                     _change(f.change, f.change_interval), beside, _percents(f.beside_chameleon_texts)])  # fmt: skip
    sections = [i for i in range(len(rows) - 1) if rows[i][0] != rows[i + 1][0]]
    return Sheet(headers, rows, f"Modes and controls, protocol {protocol}", sections=sections)


def cluster_sheet(all_figures: Sequence[Figures]) -> Sheet:
    """Return the perplexity per cluster of the test texts."""
    shown = [find(all_figures, r.variant, r.conditioning, p, p) for p in protocols_of(all_figures) for r in REGIMES]
    return by_cluster([(f"{f.scored}: {f.regime}", f.perplexity_by_cluster) for f in shown])


def by_cluster(perplexities: Sequence[tuple[str, Mapping[int, float]]]) -> Sheet:
    """Return a row per cluster and a column per named regime."""
    clusters = sorted({cluster for _, own in perplexities for cluster in own})
    rows = [
        [f"cluster {cluster}", *(number(own[cluster]) if cluster in own else "" for _, own in perplexities)]
        for cluster in clusters
    ]
    return Sheet(["", *(name for name, _ in perplexities)], rows, "Perplexity by cluster")


def checkpoint_sheets(records: Sequence[Mapping[str, Any]], wide: bool) -> list[Sheet]:
    """Return the records of `evaluate --json` as one table of few columns and one of clusters, or as one wide table."""
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
    """Format four digits after the point, as in the paper; fewer for large numbers."""
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
