"""Logits of a bundle beside those of its reference, and the checks of their figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.reference.hypernetwork import factor_stacks
from chameleon_deploy.reference.inference import ReferenceAdaptation
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.basis import enter_basis
from chameleon_deploy.runtime.decode.decoder import StaticDecoder, parts
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.runtime.factors import FactorSets, RowFactors
from chameleon_deploy.verify.gates import Check, Gate
from chameleon_deploy.verify.logit_figures import (
    LogitFigures,
    percentile_interval,
)

Rows = Sequence[Sequence[int]]
CALL_TOKENS = 256  # of a call, padding included: with a vocabulary of 150,000, their logits are 0.16 GB
STATIC_STEPS = 32  # of a decoder without slots: in int8 each step dequantises all weights, which takes over a second


class Reference(Protocol):
    """Logits [positions, vocab] of one row of a batch; `theirs` says how the batch is adapted."""

    def __call__(self, ids: Sequence[int], theirs: Any, row: int, positions: slice = ..., /) -> torch.Tensor: ...


def gate_checks(
    name: str, runtime: Runtime, reference: Reference, rows: Rows, ours: RowFactors, theirs: Any, gate: Gate
) -> Iterator[Check]:
    """The five figures of the gate, of factors as the runtime and as the reference take them."""
    figures = LogitFigures()
    for row, start, actual in logits_pieces(runtime, rows, ours, CALL_TOKENS):
        stop = start + len(actual)
        expected = reference(rows[row], theirs, row, slice(start, stop))
        figures.add(
            torch.from_numpy(actual), expected, torch.tensor(rows[row][start + 1 : stop + 1], dtype=torch.int64)
        )
    perplexities = [math.exp(nll / figures.targets) for nll in figures.nll]
    clear, agreed = figures.top1(gate.top1_gap)
    yield Check(f"{name} logits, max abs difference", figures.max_abs / figures.scale, gate.max_abs_logit,
                note=f"of the logits' scale {figures.scale:.3g}; {figures.positions} positions, up to "
                f"{max(map(len, rows))} of a text")  # fmt: skip
    yield Check(f"{name} top-1 agreement", agreed / max(clear, 1), gate.top1_agreement, at_least=True,
                note=f"{clear} positions with a gap over {gate.top1_gap:g} of the scale")  # fmt: skip
    yield from check_kl(name, figures, gate)
    yield Check(f"{name} perplexity, relative difference", abs(perplexities[0] / perplexities[1] - 1), gate.perplexity,
                note=f"reference {perplexities[1]:.4f}")  # fmt: skip


def check_few(
    name: str, logits: list[FloatArray], reference: Reference, rows: Rows, theirs: Any, gate: Gate
) -> Iterator[Check]:
    """The figures of the gate that mean something of few texts."""
    figures = LogitFigures()
    for row, (ids, actual) in enumerate(zip(rows, logits, strict=True)):
        figures.add(torch.from_numpy(actual), reference(ids, theirs, row), torch.empty(0, dtype=torch.int64))
    yield Check(f"{name} logits, max abs difference", figures.max_abs / figures.scale, gate.max_abs_logit)
    yield from check_kl(name, figures, gate)


def check_kl(name: str, figures: LogitFigures, gate: Gate) -> Iterator[Check]:
    kl = torch.cat(figures.kl)
    yield Check(f"{name} KL, mean", abs(float(kl.mean())), gate.kl_mean)
    low, high = percentile_interval(kl, 0.999)
    above = f"{high:.2g}" if high is not None else f"beyond the largest, {float(kl.max()):.2g}"
    yield Check(f"{name} KL, 99.9th percentile", float(kl.quantile(0.999)), gate.kl_p999,
                note=f"95 % interval from {low:.2g} to {above}: {len(kl)} positions")  # fmt: skip


def cache_checks(
    runtime: Runtime, reference: Reference, rows: Rows, ours: RowFactors, theirs: Any, gate: Gate
) -> Iterator[Check]:
    """Decoding token by token, from the middle of a text or over its last tokens, gives what reading it whole and what
    the reference give.

    In int8 a last bit of a sum can move a single logit far, so what is limited is the KL divergence from either.
    """
    length = min(map(len, rows))
    start, cut = max(1, length // 2), [ids[:length] for ids in rows]
    if not isinstance(runtime.decoder, SharedCacheDecoder):
        start = max(start, length - STATIC_STEPS)
    decoded = np.empty((len(rows), length - start + 1, runtime.manifest.model.vocab_size), np.float32)
    for step, logits in enumerate(_decoded(runtime.decoder, cut, start, ours)):
        decoded[:, step] = logits
    against_whole, figures, no_targets = LogitFigures(), LogitFigures(), torch.empty(0, dtype=torch.int64)
    for row, first, logits in logits_pieces(runtime, cut, ours, CALL_TOKENS):
        positions = slice(max(first, start - 1), max(first + len(logits), start - 1))  # of the piece, if decoded
        actual = torch.from_numpy(decoded[row, positions.start - start + 1 : positions.stop - start + 1])
        against_whole.add(actual, torch.from_numpy(logits[positions.start - first :]), no_targets)
        figures.add(actual, reference(rows[row], theirs, row, positions), no_targets)
    yield Check("cached decoding, max abs difference", against_whole.max_abs / figures.scale, gate.cache_tolerance,
                note=f"{figures.positions} positions")  # fmt: skip
    yield from check_kl("cached decoding against the text read whole:", against_whole, gate)
    yield from check_kl("cached decoding:", figures, gate)


def _decoded(decoder: SharedCacheDecoder | StaticDecoder, rows: Rows, start: int, factors: RowFactors) -> Iterator[Any]:
    """Prefill the first `start` tokens of rows of one length, and step through the rest.

    -> logits [batch, vocab] after start tokens, after start + 1, ... after all
    """
    every = np.arange(len(rows))
    steps = (
        ([ids[position] for ids in rows], factors.at(every, np.full(len(rows), position)))
        for position in range(start, len(rows[0]))
    )
    if isinstance(decoder, SharedCacheDecoder):
        slots = decoder.slots(len(rows), len(rows[0]))
        yield np.stack([_prefilled(slots, row, ids[:start], factors) for row, ids in enumerate(rows)])
        for token_ids, own in steps:
            yield slots.step(token_ids, own)
    else:
        logits, cache = decoder.prefill([ids[:start] for ids in rows], factors, len(rows[0]))
        yield logits
        for token_ids, own in steps:
            yield decoder.step(np.array(token_ids), own, cache)


def _prefilled(slots: Slots, row: int, ids: Sequence[int], factors: RowFactors) -> Any:
    """Prefill a text, in two parts where its update begins later.  -> logits [vocab] after it"""
    alone = factors.rows(np.array([row]))
    for start, stop in pairwise([0, *(cut for cut in alone.later() if cut < len(ids)), len(ids)]):
        logits = slots.prefill(row, [ids[start:stop]], alone.at([0], [start]), 1)
    return logits[0, 0]


def update_difference(
    reference: Reference,
    rows: Rows,
    logits: Iterable[FloatArray],
    base: Iterable[FloatArray],
    theirs: Any,
    their_base: Any,
) -> float | None:
    """The relative difference of an update's effect on all logits from the reference's; None if that has none."""
    squares = [0.0, 0.0]
    for row, (ids, ours, without) in enumerate(zip(rows, logits, base, strict=True)):
        expected = (reference(ids, theirs, row) - reference(ids, their_base, row)).double().numpy()
        squares[0] += float(np.square(ours.astype(np.float64) - without - expected).sum())
        squares[1] += float(np.square(expected).sum())
    return math.sqrt(squares[0] / squares[1]) if squares[1] else None


def as_ours(runtime: Runtime, theirs: ReferenceAdaptation, alpha: float) -> RowFactors:
    """The reference's factors as the bundle's decoder reads them."""
    stacks = {name: stack.contiguous().numpy() for name, stack in factor_stacks(theirs.factors, alpha).items()}
    entered = enter_basis(stacks, runtime.manifest.adaptation, runtime.bundle.basis())
    return RowFactors(FactorSets(entered), theirs.factor_ids.numpy())


def with_B(factors: RowFactors, change: Callable[[FloatArray], FloatArray]) -> RowFactors:
    """The same factors with the B of every target changed; [factor_sets, rank, out_features] each."""
    changed = {
        name: change(np.asarray(array)) if name.endswith(".lora_B") else array
        for name, array in factors.sets.tensors.items()
    }
    return replace(factors, sets=FactorSets(changed))


def row_logits(runtime: Runtime, rows: Rows, factors: RowFactors) -> Iterator[FloatArray]:
    """Logits [sequence, vocab] of every row of a batch."""
    pieces: list[list[FloatArray]] = [[] for _ in rows]
    for row, _, logits in logits_pieces(runtime, rows, factors, len(rows) * max(map(len, rows))):
        pieces[row].append(logits.copy())
    for row, found in enumerate(pieces):
        yield np.concatenate(found) if len(found) > 1 else found[0]
        pieces[row] = []


def logits_pieces(
    runtime: Runtime, rows: Rows, factors: RowFactors, tokens: int
) -> Iterator[tuple[int, int, FloatArray]]:
    """Row, first position and logits [positions, vocab] of every piece of every row, in calls of rows of up to `tokens`
    tokens together, or of one.

    A text of thousands of positions is never held whole: its logits would be gigabytes.
    """
    factors = replace(factors, sets=runtime.backend.place(factors.sets))
    for part in parts(np.array(list(map(len, rows))), tokens):
        batch = rows[part]
        for start, piece in runtime.decoder.all_logits(batch, factors.rows(np.arange(len(rows))[part])):
            logits = np.asarray(piece)
            for i, ids in enumerate(batch):
                if len(ids) > start:
                    yield part.start + i, start, logits[i, : len(ids) - start]
