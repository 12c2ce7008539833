"""The numeric gates: is this bundle the same model as its PyTorch reference? (docs/design.md section 8)

Everything is teacher-forced on real text. Each function below checks one promise and returns its
figures; `verify` runs them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from chameleon_deploy.contract.bundle import AdaptationSpec, FloatArray, Mode, default_mode
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.hypernetwork import factor_set, factor_stacks
from chameleon_deploy.reference.inference import ReferenceAdaptation, RowLogits
from chameleon_deploy.reference.targets import in_head_alone
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.basis import enter_basis
from chameleon_deploy.runtime.decode.decoder import StaticDecoder
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.factors import FactorSets, RowFactors
from chameleon_deploy.runtime.known_answers import KnownAnswers, adapt_rows, recorded_answers
from chameleon_deploy.runtime.scoring import score_rows
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.verify.data_checks import check_data
from chameleon_deploy.verify.faults import FAULTS
from chameleon_deploy.verify.gates import Check, Gate, accept, gate_of
from chameleon_deploy.verify.here import known_answer_checks
from chameleon_deploy.verify.logit_figures import (
    LogitFigures,
    factor_difference,
    largest,
    logit_scale,
    max_abs,
    score_difference,
)
from chameleon_deploy.verify.text_checks import check_texts

BATCH_SIZES = (1, 2, 3, 4, 8, 32)
# Tokens of a row where 32 rows, or two very unequal ones, run in one call: GPT-2's logits of 512 positions are 103 MB.
BATCHED, PADDED_TO = 16, 256
UPDATE = 0.05  # relative difference of the update from the reference's, over all logits of a few texts
# The same of updates in the trunk. Noise of int8 activations, which differ between the base and the adapted model, does
# not cancel in their difference.
UPDATES = {"fp32": UPDATE, "fp16": UPDATE, "bf16": 4 * UPDATE, "int8": None}
CLEAR = 10  # times Gate.top1_gap: the two highest logits lie so far apart that no single token may differ
CAUGHT = 0.5  # wrong factors must move logits by at least this share of what they move the reference's
Rows = Sequence[Sequence[int]]


class Reference(Protocol):
    """Logits [positions, vocab] of one row of a batch; `theirs` says how the batch is adapted."""

    def __call__(self, ids: Sequence[int], theirs: Any, row: int, positions: slice = ..., /) -> torch.Tensor: ...


def verify(
    runtime: Runtime, reference: RowLogits, rows: Rows, whole: bool, report: Progress, max_kl: float | None = None
) -> list[Check]:
    """The checks of one decoder graph on real text.

    rows    lists of token ids: 32 ragged ones, in a reduced precision texts of the length that its gate was measured
            on, and a long one (run.verification_rows)
    whole   also what does not depend on the decoder graph: counts, adaptation, modes, promise F
    max_kl  accept a mean KL of this much; None keeps the gate
    """
    updates_trunk = not in_head_alone(reference.checkpoint.config.targets)
    gate = gate_of(runtime.manifest.precision, runtime.provider, updates_trunk)
    if max_kl is not None:
        gate = accept(gate, max_kl)
    everything, rows, typical = rows, *ragged_and_typical(rows)
    few, long = rows[:8], sorted(everything, key=len)[-8:]
    modes = runtime.manifest.adaptation.modes
    steps: list[Callable[[], Iterator[Check]]] = [
        lambda: check_logits(runtime, reference, everything, gate, 1.0),
        # Information does with few texts: reading is most of the work.
        lambda: check_logits(runtime, reference, everything if _is_limited(gate, reference, 10.0) else few, gate, 10.0),
        lambda: check_cache(runtime, reference, long, gate),
        lambda: check_batching(runtime, rows, gate),
        lambda: check_scores(runtime, few, gate),
        lambda: check_base(runtime, reference, typical, gate),
        lambda: check_rerun(runtime, few),
        lambda: check_neighbours(runtime, few),
        lambda: check_wrong_factors(runtime, reference, few),
    ]
    if whole:
        steps += [
            lambda: check_data(runtime.bundle, reference.checkpoint, gate),
            lambda: check_known_answers(runtime, reference, gate),
            lambda: check_adaptation(runtime, reference.checkpoint, rows, gate),
            lambda: check_factors_alone(runtime, few),
            *(partial(check_mode, runtime, reference, typical, gate, mode) for mode in modes),
            lambda: check_texts(runtime, reference.checkpoint.trunk.tokenizer, [*few, rows[-1]]),
        ]
    return run_steps(runtime, steps, report)


def ragged_and_typical(rows: Rows) -> tuple[Rows, Rows]:
    """Return the ragged texts and the long one, and up to 8 on which a KL divergence is what its gate means."""
    *others, longest = rows
    ragged = others[:32]
    return [*ragged, longest], others[32:40] or ragged[:8]


def run_steps(runtime: Runtime, steps: Sequence[Callable[[], Iterator[Check]]], report: Progress) -> list[Check]:
    """The checks of all steps, with the graph that they were made on."""
    checks: list[Check] = []
    for done, step in enumerate(steps):
        report(f"verify {runtime.graph}", done, len(steps))
        checks += [replace(check, graph=runtime.graph) for check in step()]
    report(f"verify {runtime.graph}", len(steps), len(steps))
    return checks


def check_known_answers(runtime: Runtime, reference: RowLogits, gate: Gate) -> Iterator[Check]:
    """The record of export is what this runtime computes, and its greedy tokens are the reference's."""
    yield from known_answer_checks(runtime)
    answers = recorded_answers(runtime.bundle)
    for mode in compared_modes(runtime.manifest.adaptation):
        vectors = adapt_rows(runtime, mode, len(answers.rows)).conditioning
        conditioning = None if vectors is None else np.asarray(vectors, np.float32)
        theirs = inference.adapt(reference.checkpoint, answers.rows, mode, conditioning=conditioning)
        yield check_greedy(mode, answers, reference, theirs, gate)


def compared_modes(spec: AdaptationSpec) -> list[Mode]:
    """The modes whose greedy tokens the reference is asked for: none, and the one that the model is trained for."""
    return list(dict.fromkeys(("none", default_mode(spec))))


def continued_rows(answers: KnownAnswers, mode: Mode) -> list[list[int]]:
    """The recorded rows with the greedy tokens that continue them."""
    return [[*ids, *tokens] for ids, tokens in zip(answers.rows, answers.modes[mode].greedy, strict=True)]


def check_greedy(mode: Mode, answers: KnownAnswers, reference: Reference, theirs: Any, gate: Gate) -> Check:
    """The reference, too, chooses the recorded greedy tokens where its two highest logits lie clearly apart."""
    differ = clear = 0
    for row, (ids, text) in enumerate(zip(answers.rows, continued_rows(answers, mode), strict=True)):
        logits = reference(text, theirs, row, slice(len(ids) - 1, len(text) - 1))
        top = logits.topk(2)
        gaps = (top.values[:, 0] - top.values[:, 1]) / logit_scale([logits.numpy()])
        apart = gaps > CLEAR * gate.top1_gap
        clear += int(apart.sum())
        differ += int((top.indices[:, 0] != torch.tensor(text[len(ids) :]))[apart].sum())
    return Check(f"known answers: mode {mode}, greedy tokens that the reference does not choose", differ, 0,
                 note=f"{clear} with a gap over {CLEAR * gate.top1_gap:g} of the scale")  # fmt: skip


def check_adaptation(runtime: Runtime, checkpoint: Checkpoint, rows: Rows, gate: Gate) -> Iterator[Check]:
    """Embeddings, clusters and generated factors."""
    mode: Mode = "request" if "request" in runtime.manifest.adaptation.modes else "static"
    vectors = given(runtime, mode, range(len(rows)))
    ours, theirs = runtime.adapt(rows, mode=mode, **vectors), inference.adapt(checkpoint, rows, mode, **vectors)
    difference = max_abs(ours.embeddings, theirs.embeddings.numpy())
    yield Check("embeddings, max abs difference", difference, gate.embedding_tolerance)
    if len(checkpoint.centroids) > 1:
        distances = torch.cdist(theirs.embeddings.double(), checkpoint.centroids.double()).square()
        nearest = distances.topk(2, largest=False).values
        clear = (nearest[:, 1] - nearest[:, 0] > gate.cluster_margin).numpy()
        wrong = (ours.cluster_ids != theirs.cluster_ids.numpy())[clear].sum()
        yield Check(
            "cluster ids that differ",
            float(wrong),
            0,
            note=f"{clear.sum()} rows with a margin over {gate.cluster_margin:g}",
        )
    difference = factor_difference(ours.factors, as_ours(runtime, theirs, checkpoint.config.alpha))
    yield Check("factors, relative difference", difference, gate.factor_tolerance)


def check_logits(runtime: Runtime, reference: RowLogits, rows: Rows, gate: Gate, scale: float) -> Iterator[Check]:
    """The five figures of the gate, in the bundle's default mode, with the update multiplied by `scale`."""
    for check in _logit_checks(runtime, reference, rows, gate, scale):
        yield check if _is_limited(gate, reference, scale) else replace(check, limit=None)


def _is_limited(gate: Gate, reference: RowLogits, scale: float) -> bool:
    """Return whether `check_logits` has limits at this scale; without them its figures are information.

    A checkpoint's own factors have them in every precision, other scales in fp32 and for updates of the head only:
    attention amplifies the rounding errors of a trunk whose update is ten times the trained one.
    """
    return scale == 1.0 or (gate.max_abs_logit is not None and in_head_alone(reference.checkpoint.config.targets))


def _logit_checks(runtime: Runtime, reference: RowLogits, rows: Rows, gate: Gate, scale: float) -> Iterator[Check]:
    vectors = given(runtime, runtime.mode, range(len(rows)))
    ours = runtime.adapt(rows, **vectors).factors
    theirs = inference.adapt(reference.checkpoint, rows, runtime.mode, **vectors)
    ours = with_B(ours, lambda lora_B: lora_B * np.float32(scale))
    theirs = theirs.with_B(lambda lora_B: lora_B * scale)
    yield from gate_checks(f"x{scale:g} factors:", runtime, reference, rows, ours, theirs, gate)


def gate_checks(
    name: str, runtime: Runtime, reference: Reference, rows: Rows, ours: RowFactors, theirs: Any, gate: Gate
) -> Iterator[Check]:
    """The five figures of the gate, of factors as the runtime and as the reference take them."""
    figures = LogitFigures()
    for row, start, actual in logits_pieces(runtime, rows, ours, batch_size=8):
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


def check_cache(runtime: Runtime, reference: RowLogits, rows: Rows, gate: Gate) -> Iterator[Check]:
    """Cached decoding in the bundle's default mode."""
    vectors = given(runtime, runtime.mode, range(len(rows)))
    ours = runtime.adapt(rows, on_device=True, **vectors).factors
    theirs = inference.adapt(reference.checkpoint, rows, runtime.mode, **vectors)
    yield from cache_checks(runtime, reference, rows, ours, theirs, gate)


def cache_checks(
    runtime: Runtime, reference: Reference, rows: Rows, ours: RowFactors, theirs: Any, gate: Gate
) -> Iterator[Check]:
    """Decoding token by token from the middle of a text gives what reading it whole and what the reference give.

    In int8 a last bit of a sum can move a single logit far, so what is limited is the KL divergence from either.
    """
    length = min(map(len, rows))
    whole = list(row_logits(runtime, [ids[:length] for ids in rows], ours))
    start = max(1, length // 2)
    against_whole, figures, no_targets = LogitFigures(), LogitFigures(), torch.empty(0, dtype=torch.int64)
    decoded = _decoded(runtime.decoder, [ids[:length] for ids in rows], start, ours)
    for position, logits in enumerate(decoded, start):
        actual = torch.tensor(np.asarray(logits))
        at = slice(position - 1, position)
        against_whole.add(actual, torch.from_numpy(np.concatenate([row[at] for row in whole])), no_targets)
        expected = torch.cat([reference(ids, theirs, i, at) for i, ids in enumerate(rows)])
        figures.add(actual, expected, no_targets)
    yield Check("cached decoding, max abs difference", against_whole.max_abs / figures.scale, gate.cache_tolerance,
                note=f"{figures.positions} positions")  # fmt: skip
    yield from check_kl("cached decoding against the text read whole:", against_whole, gate)
    yield from check_kl("cached decoding:", figures, gate)


def _decoded(decoder: SharedCacheDecoder | StaticDecoder, rows: Rows, start: int, factors: RowFactors) -> Iterator[Any]:
    """Prefill the first `start` tokens of rows of one length, and step through the rest.

    -> logits [batch, vocab] after start tokens, after start + 1, ... after all
    """
    steps = [[ids[position] for ids in rows] for position in range(start, len(rows[0]))]
    if isinstance(decoder, SharedCacheDecoder):
        slots = decoder.slots(len(rows), len(rows[0]))
        alone = [factors.rows(np.array([row])) for row in range(len(rows))]
        yield np.stack([slots.prefill(row, [ids[:start]], alone[row], 1)[0, 0] for row, ids in enumerate(rows)])
        for token_ids in steps:
            yield slots.step(token_ids, factors)
    else:
        logits, cache = decoder.prefill([ids[:start] for ids in rows], factors, len(rows[0]))
        yield logits
        for token_ids in steps:
            yield decoder.step(np.array(token_ids), factors, cache)


def check_batching(runtime: Runtime, rows: Rows, gate: Gate, **arguments: Any) -> Iterator[Check]:
    """A row's logits do not depend on how many rows stand beside it, how long they are, or in which order."""
    arguments = arguments or given(runtime, runtime.mode, range(len(rows)))
    factors, tolerance = runtime.adapt(rows, on_device=True, **arguments).factors, gate.summation_order_tolerance
    longest = max(range(len(rows)), key=lambda row: len(rows[row]))
    wide, rows = rows[longest][:PADDED_TO], [ids[:BATCHED] for ids in rows]

    def run_alone(row: int) -> FloatArray:
        return next(row_logits(runtime, [rows[row]], factors.rows(np.array([row]))))

    alone = [run_alone(row) for row in range(len(rows[:8]))]
    scale, differences = logit_scale(alone), []
    for size in BATCH_SIZES[1:]:
        members = rows[:size]
        batch = row_logits(runtime, members, factors.rows(np.arange(len(members))))
        further = map(run_alone, range(len(alone), len(members)))  # one at a time: 32 rows' logits are large
        expected = itertools.chain(alone[: len(members)], further)
        differences.append(largest(max_abs(a, b) for a, b in zip(expected, batch, strict=True)))
    worst = BATCH_SIZES[1:][int(np.argmax(differences))]
    yield Check("batch sizes 1, 2, 3, 4, 8, 32, max abs difference", largest(differences) / scale, tolerance,
                note=f"promise B is not made; worst at {worst}")  # fmt: skip
    backwards = list(row_logits(runtime, rows[:8][::-1], factors.rows(np.arange(8)[::-1])))
    yield Check("row order, max abs difference", largest(map(max_abs, alone, backwards[::-1])) / scale, tolerance)
    padded = next(row_logits(runtime, [rows[0], wide], factors.rows(np.array([0, longest]))))
    yield Check("padding, max abs difference", max_abs(alone[0], padded) / scale, tolerance,
                note=f"{len(rows[0])} tokens padded to {len(wide)}")  # fmt: skip


def check_scores(runtime: Runtime, rows: Rows, gate: Gate, **arguments: Any) -> Iterator[Check]:
    """Scores, which have a graph of their own, are what the decoder's logits say."""
    arguments = arguments or given(runtime, runtime.mode, range(len(rows)))
    logits = list(row_logits(runtime, rows, runtime.adapt(rows, **arguments).factors))
    difference = score_difference(runtime.score(rows, **arguments), logits) / logit_scale(logits)
    yield Check("scores against logits, max abs difference", difference, gate.summation_order_tolerance)


def check_base(runtime: Runtime, reference: RowLogits, rows: Rows, gate: Gate) -> Iterator[Check]:
    """Mode none, and factors whose alpha is 0, are the frozen base model."""
    none, theirs = runtime.adapt(rows, mode="none").factors, inference.adapt(reference.checkpoint, rows, "none")
    ours = list(row_logits(runtime, rows, none))
    yield from check_few("mode none against the base model:", ours, reference, rows, theirs, gate)
    silent = with_B(runtime.adapt(rows, **given(runtime, runtime.mode, range(len(rows)))).factors, np.zeros_like)
    difference = largest(map(max_abs, ours, row_logits(runtime, rows, silent)))
    yield Check("alpha 0 against mode none", difference, 0)


def check_mode(runtime: Runtime, reference: RowLogits, rows: Rows, gate: Gate, mode: Mode) -> Iterator[Check]:
    """A mode has the reference's factors and logits, and its scores come of them.

    Factors are exact or nearly in every precision: their limit tells wrong ones that a reduced precision's logits would
    hide.
    """
    arguments, theirs = _arguments_of(mode, runtime, reference.checkpoint, rows)
    ours, scores = runtime.adapt(rows, mode=mode, **arguments), runtime.score(rows, mode=mode, **arguments)
    difference = factor_difference(ours.factors, as_ours(runtime, theirs, reference.checkpoint.config.alpha))
    yield Check(f"mode {mode}: factors, relative difference", difference, gate.factor_tolerance)
    logits = list(row_logits(runtime, rows, ours.factors))
    yield from check_few(f"mode {mode}:", logits, reference, rows, theirs, gate)
    yield from _check_update(mode, runtime, reference, rows, logits, theirs)
    yield Check(
        f"mode {mode}: scores against logits, max abs difference",
        score_difference(scores, logits) / logit_scale(logits),
        gate.summation_order_tolerance,
    )
    again = score_rows(rows, runtime.decoder, runtime.adapt(rows, mode=mode, on_device=True, **arguments))
    difference = largest(max_abs(a.token_logprobs, b.token_logprobs) for a, b in zip(scores, again, strict=True))
    yield Check(f"mode {mode}: scores against scores with the factors of adapt", difference, 0)


def _check_update(
    mode: Mode,
    runtime: Runtime,
    reference: RowLogits,
    rows: Rows,
    logits: list[FloatArray],
    theirs: ReferenceAdaptation,
) -> Iterator[Check]:
    """The update, which is how far a mode's logits lie from those of mode none, is the reference's update.

    Both sides of a subtraction have the errors of one precision, so that a coarse one hides no wrong factors.
    """
    base = row_logits(runtime, rows, runtime.adapt(rows, mode="none").factors)
    their_base = inference.adapt(reference.checkpoint, rows, "none")
    difference = update_difference(reference, rows, logits, base, theirs, their_base)
    limit = UPDATE if in_head_alone(reference.checkpoint.config.targets) else UPDATES[runtime.manifest.precision]
    if difference is not None:
        yield Check(f"mode {mode}: update, relative difference", difference, limit)
    elif mode != "none":
        yield Check(f"mode {mode}: update, relative difference", 0, None, note="not checked: it changes no logit")


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


def _arguments_of(
    mode: Mode, runtime: Runtime, checkpoint: Checkpoint, rows: Rows
) -> tuple[dict[str, Any], ReferenceAdaptation]:
    """Return the arguments that a mode takes besides texts, and the reference's adaptation with them."""
    if vectors := given(runtime, mode, range(len(rows))):
        return vectors, inference.adapt(checkpoint, rows, mode, **vectors)
    if mode == "static" and runtime.manifest.adaptation.regime == "chameleon":
        # The caller's factors: those that the reference generates for the first text.
        theirs = inference.adapt(checkpoint, rows[:1], "request", **given(runtime, "request", [0]))
        theirs = replace(theirs, factor_ids=torch.zeros(len(rows), dtype=torch.int64))
        one_set = factor_set(theirs.factors, 0, checkpoint.config.alpha)
        return {"factors": {name: factor.numpy() for name, factor in one_set.items()}}, theirs
    tenants = None
    if mode == "tenant":  # two in every cluster of more than one text, or they would change nothing
        clusters = inference.adapt(checkpoint, rows, "none").cluster_ids.tolist()
        tenants = [clusters[:row].count(cluster) % 2 for row, cluster in enumerate(clusters)]
    return {"tenants": tenants}, inference.adapt(checkpoint, rows, mode, tenants)


def given(runtime: Runtime, mode: Mode, rows: Sequence[int]) -> dict[str, Any]:
    """The argument `conditioning` of rows, for a bundle that takes the caller's vectors: any of length one."""
    size = runtime.manifest.adaptation.conditioning_size
    if not size or mode != "request":
        return {}
    vectors = np.stack([np.random.default_rng(row).normal(size=size) for row in rows])
    return {"conditioning": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)}


def check_rerun(runtime: Runtime, rows: Rows, **arguments: Any) -> Iterator[Check]:
    """Promise R: a rerun gives the same bits."""
    factors = runtime.adapt(rows, **(arguments or given(runtime, runtime.mode, range(len(rows))))).factors
    first, second = (list(row_logits(runtime, rows, factors)) for _ in range(2))
    yield Check("promise R: rerun, max abs difference", largest(map(max_abs, first, second)), 0)


def check_neighbours(runtime: Runtime, rows: Rows, **arguments: Any) -> Iterator[Check]:
    """In calls of one shape a row's logits are the same bits whatever text its neighbours hold."""
    length = min(8, runtime.manifest.model.max_positions)
    first = next(ids for ids in rows if len(ids) >= length)[:length]
    edited = [(token_id + 1) % runtime.manifest.model.vocab_size for token_id in first]
    both = runtime.adapt([first], **(arguments or {"mode": "none"})).factors.rows(np.zeros(2, np.int64))
    logits = [next(row_logits(runtime, [first, other], both)) for other in (first, edited)]
    yield Check("a neighbour's text: max abs difference", max_abs(*logits), 0)


def check_factors_alone(runtime: Runtime, rows: Rows) -> Iterator[Check]:
    """Promise F: in a batch-independent mode a row's factors are the same bits, whatever stands beside it."""
    modes: tuple[Mode, ...] = ("none", "centroid", "request")
    for mode in (m for m in modes if m in runtime.manifest.adaptation.modes):
        together = runtime.adapt(rows, mode=mode, **given(runtime, mode, range(len(rows)))).factors
        differences = []
        for row, ids in enumerate(rows):
            alone = runtime.adapt([ids], mode=mode, **given(runtime, mode, [row])).factors
            own = together.rows(np.array([row]))
            for name, array in own.sets[own.factor_ids].tensors.items():
                differences.append(max_abs(alone.sets.tensors[name], array))
        yield Check(f"promise F: mode {mode}, factors alone and in a batch", largest(differences), 0)


def check_wrong_factors(runtime: Runtime, reference: RowLogits, rows: Rows) -> Iterator[Check]:
    """Wrong factors change the bundle's logits as much as they change the reference's.

    Like is compared with like: how far a mutation moves the logits of each model from its own right ones. So a coarse
    precision is not refused for being coarse, and a decoder that ignores its factors is caught in every precision.
    """
    mode: Mode = "request" if "request" in runtime.manifest.adaptation.modes else "static"
    vectors = given(runtime, mode, range(len(rows)))
    ours = runtime.adapt(rows, mode=mode, **vectors).factors
    theirs = inference.adapt(reference.checkpoint, rows, mode, **vectors)
    right, expected = list(row_logits(runtime, rows, ours)), _reference_logits(reference, rows, theirs)
    mutations = _mutations(ours, theirs)
    if not in_head_alone(reference.checkpoint.config.targets):
        mutations |= _faults(runtime, theirs, reference.checkpoint.config.alpha)
    for name, (wrong, theirs_wrong) in mutations.items():
        moved = largest(map(max_abs, row_logits(runtime, rows, wrong), right))
        must_move = largest(map(max_abs, _reference_logits(reference, rows, theirs_wrong), expected))
        if must_move > 0:
            yield Check(f"caught: {name}", moved / must_move, CAUGHT, at_least=True,
                        note=f"moves logits by {moved:.2g}, the reference's by {must_move:.2g}")  # fmt: skip
        else:
            yield Check(f"caught: {name}", moved, None, note="not checked: it changes no logit of the reference")
    if len(ours.sets) < 2:
        for name in ("A and B of another row", "B of another row"):
            yield Check(f"caught: {name}", 0, None, note=f"not checked: mode {mode} has one factor set")


def as_ours(runtime: Runtime, theirs: ReferenceAdaptation, alpha: float) -> RowFactors:
    """The reference's factors as the bundle's decoder reads them."""
    stacks = {name: stack.contiguous().numpy() for name, stack in factor_stacks(theirs.factors, alpha).items()}
    entered = enter_basis(stacks, runtime.manifest.adaptation, runtime.bundle.basis())
    return RowFactors(FactorSets(entered), theirs.factor_ids.numpy())


def _faults(
    runtime: Runtime, theirs: ReferenceAdaptation, alpha: float
) -> dict[str, tuple[RowFactors, ReferenceAdaptation]]:
    """Faults of layers, planted before factors enter the basis of the bundle's layers."""
    spec, found = runtime.manifest.adaptation, {}
    for name, fault in FAULTS.items():
        wrong = replace(theirs, factors=dict(fault(spec, theirs.factors)))
        found[name] = as_ours(runtime, wrong, alpha), wrong
    return found


def _mutations(ours: RowFactors, theirs: ReferenceAdaptation) -> dict[str, tuple[RowFactors, ReferenceAdaptation]]:
    """The same faults of the factors of both models."""
    found = {"lora_B of the opposite sign": (with_B(ours, np.negative), theirs.with_B(torch.neg))}
    sets = len(ours.sets)
    if sets > 1:  # mode request: set i is row i's, in both
        following = (ours.factor_ids + 1) % sets
        found["A and B of another row"] = (
            replace(ours, factor_ids=following),
            replace(theirs, factor_ids=torch.from_numpy(following)),
        )
        found["B of another row"] = (
            with_B(ours, lambda lora_B: np.roll(lora_B, -1, axis=0)),
            theirs.with_B(lambda lora_B: lora_B.roll(-1, 0)),
        )
    return found


def _reference_logits(reference: RowLogits, rows: Rows, factors: ReferenceAdaptation) -> list[FloatArray]:
    return [reference(ids, factors, row).numpy() for row, ids in enumerate(rows)]


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
    yield Check(f"{name} KL, 99.9th percentile", float(kl.quantile(0.999)), gate.kl_p999)


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
    for row, _, logits in logits_pieces(runtime, rows, factors, len(rows)):
        pieces[row].append(logits.copy())
    for row, parts in enumerate(pieces):
        yield np.concatenate(parts) if len(parts) > 1 else parts[0]
        pieces[row] = []


def logits_pieces(
    runtime: Runtime, rows: Rows, factors: RowFactors, batch_size: int
) -> Iterator[tuple[int, int, FloatArray]]:
    """Row, first position and logits [positions, vocab] of every piece of every row, batch_size rows at a time.

    A text of thousands of positions is never held whole: its logits would be gigabytes.
    """
    factors = replace(factors, sets=runtime.backend.place(factors.sets))
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        own = factors.rows(np.arange(first, first + len(batch)))
        for start, piece in runtime.decoder.all_logits(batch, own):
            logits = np.asarray(piece)
            for i, ids in enumerate(batch):
                if len(ids) > start:
                    yield first + i, start, logits[i, : len(ids) - start]
