"""The numeric gates of a checkpoint: is this bundle the same model as its PyTorch reference? (docs/design.md section 8)

Everything is teacher-forced on real text. Each function below checks one promise and returns its
figures; `verify_checkpoint` runs them all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from chameleon_deploy.contract.bundle import AdaptationSpec, FloatArray, Mode, default_mode
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.hypernetwork import factor_set
from chameleon_deploy.reference.inference import ReferenceAdaptation, RowLogits
from chameleon_deploy.reference.targets import in_head_alone
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.known_answers import TEXTS as KNOWN_TEXTS
from chameleon_deploy.runtime.known_answers import KnownAnswers, adapt_rows, recorded_answers
from chameleon_deploy.runtime.scoring import score_rows
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.verify.data_checks import check_data
from chameleon_deploy.verify.gates import Check, Gate, accept, gate_of
from chameleon_deploy.verify.here import known_answer_checks
from chameleon_deploy.verify.logit_checks import (
    Reference,
    Rows,
    as_ours,
    cache_checks,
    check_few,
    gate_checks,
    row_logits,
    update_difference,
    with_B,
)
from chameleon_deploy.verify.logit_figures import (
    factor_difference,
    largest,
    logit_scale,
    max_abs,
    score_difference,
)
from chameleon_deploy.verify.promises import (
    check_batching,
    check_factors_alone,
    check_neighbours,
    check_rerun,
    check_scores,
    check_texts,
    given,
)
from chameleon_deploy.verify.wrong_factors import check_wrong_factors

UPDATE = 0.05  # relative difference of the update from the reference's, over all logits of a few texts
# The same of updates in the trunk. Noise of int8 activations, which differ between the base and the adapted model, does
# not cancel in their difference.
UPDATES = {"fp32": UPDATE, "fp16": UPDATE, "bf16": 4 * UPDATE, "int8": None, "int4": None}
# In int4 the hidden states that a head's update reads are further from the reference's: 0.08 on the tiny model.
HEAD_UPDATES = dict.fromkeys(UPDATES, UPDATE) | {"int4": 4 * UPDATE}
ENCODER = 1e-5  # difference of an embedding from PyTorch's
Steps = dict[str, Callable[[], Iterator[Check]]]
CLEAR = 10  # times Gate.top1_gap: the two highest logits lie so far apart that no single token may differ


def verify_checkpoint(
    runtime: Runtime,
    reference: RowLogits,
    rows: Rows,
    whole: bool,
    report: Progress,
    max_kl: float | None = None,
    until: float = math.inf,
) -> list[Check]:
    """The checks of one decoder graph on real text.

    rows    lists of token ids: 32 ragged ones, in a reduced precision texts of the length that its gate was measured
            on, and a long one (run.verification_rows)
    whole   also what does not depend on the decoder graph: counts, adaptation, modes, promise F
    max_kl  accept a mean KL of this much; None keeps the gate
    until   see `run_steps`
    """
    updates_trunk = not in_head_alone(reference.checkpoint.config.targets)
    gate = gate_of(runtime.manifest.precision, runtime.provider, updates_trunk)
    if max_kl is not None:
        gate = accept(gate, max_kl)
    everything, rows, typical = rows, *ragged_and_typical(rows)
    few, long = rows[:8], sorted(everything, key=len)[-8:]
    modes = runtime.manifest.adaptation.modes
    # Information does with few texts: reading is most of the work.
    strong = everything if _is_limited(gate, reference, 10.0) else few
    steps: Steps = {
        "logits": lambda: check_logits(runtime, reference, everything, gate, 1.0),
        "logits of ten times the factors": lambda: check_logits(runtime, reference, strong, gate, 10.0),
        "cached decoding": lambda: check_cache(runtime, reference, long, gate),
        "batching": lambda: check_batching(runtime, rows, gate),
        "scores": lambda: check_scores(runtime, few, gate),
        "mode none": lambda: check_base(runtime, reference, typical, gate),
        "reruns": lambda: check_rerun(runtime, few),
        "neighbours": lambda: check_neighbours(runtime, few),
        "wrong factors": lambda: check_wrong_factors(runtime, reference, few),
    }
    if whole:
        of_modes = {
            f"mode {mode}, all of it": partial(check_mode, runtime, reference, typical, gate, mode) for mode in modes
        }
        steps |= {
            "data": lambda: check_data(runtime.bundle, reference.checkpoint, gate),
            "encoder": lambda: check_encoder(runtime, reference.checkpoint),
            "known answers": lambda: check_known_answers(runtime, reference, gate),
            "adaptation": lambda: check_adaptation(runtime, reference.checkpoint, rows, gate),
            "factors alone": lambda: check_factors_alone(runtime, few),
            **of_modes,
            "texts": lambda: check_texts(runtime, reference.checkpoint.trunk.tokenizer, [*few, rows[-1]]),
        }
    return run_steps(runtime, steps, report, until)


def ragged_and_typical(rows: Rows) -> tuple[Rows, Rows]:
    """Return the ragged texts and the long one, and up to 8 on which a KL divergence is what its gate means."""
    *others, longest = rows
    ragged = others[:32]
    return [*ragged, longest], others[32:40] or ragged[:8]


def run_steps(runtime: Runtime, steps: Steps, report: Progress, until: float = math.inf) -> list[Check]:
    """The checks of all steps, with the graph that they were made on.

    until  the time of the monotonic clock from which no step begins; those are named as left out
    """
    checks: list[Check] = []
    for done, (name, step) in enumerate(steps.items()):
        report(f"verify {runtime.graph}", done, len(steps))
        left_out = Check(f"left out: {name}", 0, limit=None, note="not checked: the time was over")
        found = step() if time.monotonic() < until else [left_out]
        checks += [replace(check, graph=runtime.graph) for check in found]
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
    """The recorded rows with the greedy tokens that continue them, but for the last, after which nothing is chosen."""
    return [[*ids, *tokens[:-1]] for ids, tokens in zip(answers.rows, answers.modes[mode].greedy, strict=True)]


def check_greedy(mode: Mode, answers: KnownAnswers, reference: Reference, theirs: Any, gate: Gate) -> Check:
    """The reference, too, chooses the recorded greedy tokens where its two highest logits lie clearly apart."""
    differ = clear = 0
    texts, greedy = continued_rows(answers, mode), answers.modes[mode].greedy
    for row, (ids, text, chosen) in enumerate(zip(answers.rows, texts, greedy, strict=True)):
        logits = reference(text, theirs, row, slice(len(ids) - 1, None))
        top = logits.topk(2)
        gaps = (top.values[:, 0] - top.values[:, 1]) / logit_scale([logits.numpy()])
        apart = gaps > CLEAR * gate.top1_gap
        clear += int(apart.sum())
        differ += int((top.indices[:, 0] != torch.tensor(chosen))[apart].sum())
    return Check(f"known answers: mode {mode}, greedy tokens that the reference does not choose", differ, 0,
                 note=f"{clear} with a gap over {CLEAR * gate.top1_gap:g} of the scale")  # fmt: skip


def check_encoder(runtime: Runtime, checkpoint: Checkpoint) -> Iterator[Check]:
    """The encoder of a bundle is the reference's, its tokenizer, special tokens, pooling and normalisation too."""
    if runtime.encoder is None:
        return
    if checkpoint.encoder is None:
        yield Check("left out: encoder", 1, limit=None, note="not checked: name it with --encoder DIR")
        return
    room = runtime.encoder.spec.max_tokens // 4  # characters: a token has at least one
    texts = [text[:room] for text in KNOWN_TEXTS]
    theirs = np.stack([checkpoint.encoder.embed(text).numpy() for text in texts])
    ours = runtime.encoder.embed(runtime.encoder.encode(texts))
    yield Check("encoder: embeddings, max abs difference", max_abs(ours, theirs), ENCODER)


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


def check_cache(runtime: Runtime, reference: RowLogits, rows: Rows, gate: Gate) -> Iterator[Check]:
    """Cached decoding in the bundle's default mode."""
    vectors = given(runtime, runtime.mode, range(len(rows)))
    ours = runtime.adapt(rows, on_device=True, **vectors).factors
    theirs = inference.adapt(reference.checkpoint, rows, runtime.mode, **vectors)
    yield from cache_checks(runtime, reference, rows, ours, theirs, gate)


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
    limits = HEAD_UPDATES if in_head_alone(reference.checkpoint.config.targets) else UPDATES
    limit = limits[runtime.manifest.precision]
    if difference is not None:
        yield Check(f"mode {mode}: update, relative difference", difference, limit)
    elif mode != "none":
        yield Check(f"mode {mode}: update, relative difference", 0, limit=None, note="not checked: it changes no logit")


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
