"""The numeric gates of every precision (docs/design.md section 8), and a figure against its limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chameleon_deploy.contract.bundle import Precision
from chameleon_deploy.errors import CheckFailedError


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The limits of one precision; None is reported and not limited.

    Differences and gaps of logits are relative to the logits' scale (`logit_figures.logit_scale`).

    max_abs_logit              largest difference of a logit from the reference's
    top1_agreement             share of positions with the reference's best token, where its top-1 gap exceeds top1_gap
    kl_mean, kl_p999           KL divergence from the reference, mean and 99.9th percentile over positions
    perplexity                 relative difference from the reference's
    summation_order_tolerance  of a logit or log-probability between calls that differ in batch size, row order, padding
                               or graph, and so in the order of their sums only
    rounding_tolerance         the same between calls that may also round activations of the trunk differently
    cache_tolerance            of a logit between cached decoding and reading the text whole
    embedding_tolerance        of a channel of a text embedding
    cluster_margin             texts whose two nearest centroids differ by more than this have the reference's cluster
    factor_tolerance           of a factor, relative to the largest factor
    row_tolerance              of a row of the head, relative to its norm; in int8 of the token embedding too, which is
                               exact elsewhere
    """

    max_abs_logit: float | None
    top1_agreement: float
    top1_gap: float
    kl_mean: float
    kl_p999: float
    perplexity: float
    summation_order_tolerance: float
    rounding_tolerance: float
    cache_tolerance: float | None
    embedding_tolerance: float = 1e-5
    cluster_margin: float = 1e-5
    factor_tolerance: float = 1e-4
    row_tolerance: float = 0


GATES: dict[Precision, Gate] = {
    "fp32": Gate(
        max_abs_logit=5e-4,
        top1_agreement=1.0,
        top1_gap=1e-3,
        kl_mean=1e-7,
        kl_p999=1e-5,
        perplexity=1e-4,
        summation_order_tolerance=5e-4,
        rounding_tolerance=5e-4,
        cache_tolerance=5e-4,
    ),
    # In reduced precisions a last bit of a sum can decide how an activation is rounded, which a cache keeps.
    "fp16": Gate(
        max_abs_logit=None,
        top1_agreement=0.997,
        top1_gap=1e-2,
        kl_mean=1e-4,
        kl_p999=5e-3,
        perplexity=1e-3,
        summation_order_tolerance=1e-4,
        rounding_tolerance=5e-2,
        row_tolerance=1e-3,
        cache_tolerance=None,  # the KL's limits hold for cached decoding too
    ),
    "bf16": Gate(
        max_abs_logit=None,
        top1_agreement=0.995,
        top1_gap=1e-1,
        kl_mean=5e-4,
        kl_p999=1e-2,
        perplexity=5e-3,
        summation_order_tolerance=1e-4,
        rounding_tolerance=3e-1,
        row_tolerance=4e-3,
        cache_tolerance=None,
    ),
    # Set by real models: on SmolLM2-135M, WikiText-2, OpenVINO's int8 has a mean KL of 1.1e-2 and +0.7 % perplexity,
    # CTranslate2's 4.1e-2 and +4.0 %.
    "int8": Gate(
        max_abs_logit=None,
        top1_agreement=0.97,
        top1_gap=1e-1,
        kl_mean=5e-3,
        kl_p999=1e-1,
        perplexity=5e-3,
        summation_order_tolerance=1e-3,
        rounding_tolerance=3e-1,
        cache_tolerance=None,
        embedding_tolerance=1e-2,  # pooled from the head's int8 rows
        cluster_margin=1e-3,
        factor_tolerance=2e-2,
        row_tolerance=4e-2,  # 2.6e-2 on SmolLM2-135M
    ),
    # Three times what Qwen2.5-Coder-0.5B has on WikiText-2, off every grid (docs/lab/int4.md): mean KL 3.7e-2, 99.9th
    # percentile 0.48, perplexity +3.1 %. SmolLM2-135M misses the 99.9th percentile: int8 is the precision for it.
    "int4": Gate(
        max_abs_logit=None,
        top1_agreement=0.85,
        top1_gap=1e-1,
        kl_mean=1e-1,
        kl_p999=1.5,
        perplexity=1e-1,
        summation_order_tolerance=1e-3,
        rounding_tolerance=3e-1,
        cache_tolerance=None,
        embedding_tolerance=1e-2,  # as in int8: the same head, embedding and hypernetwork
        cluster_margin=1e-3,
        factor_tolerance=2e-2,
        row_tolerance=4e-2,
    ),
}
TENSORRT_FP32 = Gate(  # its kernels sum in other orders than the reference
    max_abs_logit=1e-3,
    top1_agreement=0.9999,
    top1_gap=1e-3,
    kl_mean=1e-6,
    kl_p999=1e-4,
    perplexity=2e-4,
    summation_order_tolerance=1e-3,
    rounding_tolerance=1e-3,
    cache_tolerance=1e-3,
)


def gate_of(precision: Precision, provider: str, updates_trunk: bool = False) -> Gate:
    """The gate of a precision on a provider ("cpu", "cuda" or "tensorrt").

    updates_trunk  whether factors update more than the head

    A device chooses its kernel by the shape of the call, and the stacked factor sets of a call decide the order of an
    update's sums. In a reduced precision each may round an activation of the trunk differently.
    """
    if provider == "tensorrt" and precision == "fp32":
        return TENSORRT_FP32
    gate = GATES[precision]
    if provider == "cpu" and (precision == "fp32" or not updates_trunk):
        return gate
    return replace(gate, summation_order_tolerance=gate.rounding_tolerance)


def accept(gate: Gate, max_kl: float) -> Gate:
    """Relax a gate to a mean KL of max_kl, and what grows with the KL in proportion. Never tightens."""
    factor = max(1.0, max_kl / gate.kl_mean)
    return replace(
        gate,
        kl_mean=gate.kl_mean * factor,
        kl_p999=gate.kl_p999 * factor,
        perplexity=gate.perplexity * factor,
        top1_agreement=max(0.0, 1 - (1 - gate.top1_agreement) * factor),
    )


@dataclass(frozen=True, kw_only=True)
class KnownAnswerGate:
    """Limits for the distance of a machine's answers from the recorded ones (runtime/known_answers.py).

    hidden_states  norm of all differences, relative to that of the recorded values
    logprob        mean difference of a token's log-probability, in nats
    gap            greedy tokens must be the recorded ones while the two best lie further apart than this, in nats
    """

    hidden_states: float
    logprob: float
    gap: float


# Kernels of other processors sum in another order. In int8 a last bit of a sum decides how an activation is rounded.
# Sums that saturate at 16 bits are further off: docs/lab/testing.md has both.
KNOWN_ANSWERS: dict[Precision, KnownAnswerGate] = {
    "fp32": KnownAnswerGate(hidden_states=1e-4, logprob=1e-4, gap=1e-2),
    "fp16": KnownAnswerGate(hidden_states=1e-2, logprob=5e-3, gap=1e-1),
    "bf16": KnownAnswerGate(hidden_states=5e-2, logprob=2e-2, gap=3e-1),
    "int8": KnownAnswerGate(hidden_states=2e-2, logprob=1e-1, gap=5e-1),
    "int4": KnownAnswerGate(hidden_states=2e-2, logprob=1e-1, gap=5e-1),
}
# Of another graph than the one that computed the record, which rounds activations elsewhere or not at all.
OTHER_GRAPH: dict[Precision, KnownAnswerGate] = KNOWN_ANSWERS | {
    "int8": KnownAnswerGate(hidden_states=1.0, logprob=2e-1, gap=1.0),
    "int4": KnownAnswerGate(hidden_states=1.0, logprob=2e-1, gap=1.0),
}


@dataclass(frozen=True)
class Check:
    """One figure against its limit; `at_least` turns the comparison round, limit None is information.

    A figure that is not finite passes neither.
    """

    name: str
    value: float
    limit: float | None
    at_least: bool = False
    note: str = ""
    graph: str = ""  # the decoder graph that it was measured on

    @property
    def passed(self) -> bool:
        if self.limit is None or not math.isfinite(self.value):
            return math.isfinite(self.value)
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def require_passed(checks: Sequence[Check]) -> None:
    """Raise CheckFailedError with the names of the missed checks, if any."""
    missed = [f"{check.graph}: {check.name}" for check in checks if not check.passed]
    if missed:
        raise CheckFailedError(f"{len(missed)} of {len(checks)} checks missed: {'; '.join(missed)}")
