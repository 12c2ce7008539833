"""Embedding, clustering and conditioning of a batch (docs/design.md sections 2 and 3), in numpy.

Sums run in float64 in a fixed order and are rounded to float32 once. The C++ runtime therefore computes bitwise equal
conditioning vectors and factors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, get_args

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.adapter_file import Factors
from chameleon_deploy.contract.bundle import AdaptationSpec, FloatArray, IntArray, Mode
from chameleon_deploy.contract.token_embedding import TokenEmbedding
from chameleon_deploy.errors import InputError, ModeError
from chameleon_deploy.runtime.adapters import AdapterChoice
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.runtime.inputs import check_integer, is_sequence


@dataclass(frozen=True, eq=False)
class Adapt:
    """Options of one call: its adaptation mode, and the arguments that this mode needs.

    mode          none, static, centroid, request, cohort or tenant; None takes the runtime's
    tenants       mode tenant: the tenant of each text, any hashable values
    factors       mode static: one set, float32 [rank, in_features or out_features] by tensor name, for example
                  "lm_head.lora_A" [rank, hidden] and "lm_head.lora_B" [rank, vocab]; alpha already applied, any rank
    adapters      mode static, which they imply: for each text the name of its adapter, weights by name for the
                  weighted sum of several updates, such as {"legal": 0.7, "code": 0.3}, or None for the base model
    conditioning  mode request of a bundle whose hypernetwork reads vectors of the caller: float32 [texts,
                  conditioning_size], such as the embedding of each text's task
    adapt_text    mode request of a bundle with a sentence encoder, in the place of conditioning: a description of the
                  task, such as "answer like a lawyer", for all texts or one per text
    adapt_tokens  embed only this many leading tokens of every text; None embeds all

    Raises ModeError or InputError for fields that are wrong in any bundle; a call checks the rest.
    """

    mode: Mode | None = None
    tenants: Sequence[Hashable] | None = None
    factors: Factors | None = None
    adapters: Sequence[AdapterChoice] | None = None
    conditioning: npt.ArrayLike | None = None
    adapt_tokens: int | None = None
    adapt_text: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.mode is not None:
            check_mode(self.mode)
        elif self.adapters is not None:
            object.__setattr__(self, "mode", "static")
        if self.adapters is not None and (self.mode != "static" or self.factors is not None):
            raise ModeError(
                "adapters go with mode 'static' and without factors: pass nothing else with them", "adapters"
            )
        if self.adapt_text is not None and self.conditioning is not None:
            raise InputError("adapt_text and conditioning both say what the updates are of: pass one", "adapt_text")
        if self.adapt_tokens is not None:
            object.__setattr__(self, "adapt_tokens", check_integer("adapt_tokens", self.adapt_tokens, 1))


class AdaptKeywords(TypedDict, total=False):
    """The fields of Adapt as keywords."""

    mode: Mode | None
    tenants: Sequence[Hashable] | None
    factors: Factors | None
    adapters: Sequence[AdapterChoice] | None
    conditioning: npt.ArrayLike | None
    adapt_tokens: int | None
    adapt_text: str | Sequence[str] | None


def check_mode(mode: Any) -> None:
    """Raise ModeError unless an argument is the name of a mode."""
    if not isinstance(mode, str) or mode not in get_args(Mode):
        raise ModeError(f"{mode!r:.40} is not a mode: choose one of {', '.join(get_args(Mode))}", "mode")


@dataclass(frozen=True)
class Adaptation:
    """A batch after embedding, clustering and the generation of its factors.

    embeddings   float32 [batch, hidden], text embeddings of norm one
    cluster_ids  int64 [batch], the nearest centroid; -1 in a bundle without centroids
    factors      the factor sets of the batch, and the set that each row uses
    """

    embeddings: FloatArray
    cluster_ids: IntArray
    factors: RowFactors


def embed(
    rows: Sequence[Sequence[int]], token_embedding: TokenEmbedding, spec: AdaptationSpec, eos_token_id: int
) -> FloatArray:
    """Return e = p / (||p|| + 1e-8), where p is the mean token embedding of a row.  -> float32 [batch, hidden]

    Protocol `paper` also pools the EOS padding up to max_length.
    """
    embeddings = np.empty((len(rows), token_embedding.stored.shape[1]), np.float32)
    for i, ids in enumerate(rows):
        count = len(ids)
        pooled = token_embedding.rows(np.asarray(ids)).sum(0)
        if spec.protocol == "paper" and count < spec.max_length:
            pooled += (spec.max_length - count) * token_embedding.rows(np.array([eos_token_id]))[0]
            count = spec.max_length
        pooled = token_embedding.restore(pooled / count)
        embeddings[i] = pooled / (np.sqrt((pooled * pooled).sum()) + 1e-8)
    return embeddings


def assign(embeddings: FloatArray, centroids: FloatArray) -> IntArray:
    """Return argmin_k ||e - mu_k||^2, ties to the lowest k; -1 without centroids.  -> int64 [batch]"""
    if not len(centroids):
        return np.full(len(embeddings), -1, np.int64)
    difference = embeddings[:, None].astype(np.float64) - centroids[None].astype(np.float64)
    nearest: IntArray = (difference * difference).sum(2).argmin(1).astype(np.int64)
    return nearest


def conditioning(
    embeddings: FloatArray, cluster_ids: IntArray, tenants: Sequence[Hashable] | None
) -> tuple[FloatArray, IntArray]:
    """Return the mean embedding of the rows of each cluster, or of each tenant and cluster: the hypernetwork's inputs.

    -> conditioning float32 [factor_sets, hidden], factor_ids int64 [batch]; sets in order of first appearance
    """
    batch = len(embeddings)
    groups: dict[Hashable, list[int]] = {}
    for row in range(batch):
        tenant = tenants[row] if tenants is not None else None
        # the type is in the key because 1 == True == 1.0
        groups.setdefault((type(tenant), tenant, int(cluster_ids[row])), []).append(row)
    vectors = np.empty((len(groups), embeddings.shape[1]), np.float32)
    factor_ids = np.empty(batch, np.int64)
    for i, members in enumerate(groups.values()):
        vectors[i] = embeddings[members].astype(np.float64).sum(0) / len(members)
        factor_ids[members] = i
    return vectors, factor_ids


def check_conditioning(mode: Mode, vectors: npt.ArrayLike | None, size: int, batch: int) -> FloatArray | None:
    """Return the vectors that a caller gives, float32 [batch, size]; None where the hypernetwork reads embeddings.

    size  AdaptationSpec.conditioning_size

    Raises ModeError unless vectors are given exactly in mode `request` of a bundle that takes them, InputError for
    another shape, NaN or infinity.
    """
    if (vectors is not None) != (size > 0 and mode == "request"):
        takes = f"needs conditioning in mode 'request', float32 [texts, {size}]" if size else "takes no conditioning"
        raise ModeError(
            f"mode {mode!r} {'without' if vectors is None else 'with'} conditioning: this bundle {takes}",
            "conditioning",
        )
    if vectors is None:
        return None
    try:
        with np.errstate(over="ignore"):  # what becomes infinity is refused below
            array = np.ascontiguousarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"conditioning is no array of numbers: {error}", "conditioning") from error
    if array.shape != (batch, size):
        raise InputError(
            f"conditioning has shape {array.shape}, expected ({batch}, {size}): a vector per text", "conditioning"
        )
    if not np.isfinite(array).all():
        raise InputError("conditioning holds NaN or infinity", "conditioning")
    return array


def check_tenants(mode: Mode, tenants: Sequence[Hashable] | None, batch: int) -> None:
    """Raise InputError unless tenants are given exactly in mode `tenant`, one per row."""
    if (mode == "tenant") != (tenants is not None):
        passed = "no tenants" if tenants is None else "tenants"
        raise InputError(
            f"mode {mode!r} with {passed}: mode 'tenant' needs one tenant per text, other modes take none", "tenants"
        )
    if tenants is None:
        return
    if not is_sequence(tenants):
        raise InputError(
            f"tenants must be a list with one tenant per text, got a single {type(tenants).__name__}", "tenants"
        )
    if len(tenants) != batch:
        raise InputError(f"{len(tenants)} tenants for {batch} texts: pass one per text", "tenants")
    for row, tenant in enumerate(tenants):
        try:
            hash(tenant)
        except TypeError as error:
            raise InputError(f"tenant {row}: {error}: pass a string or a number", "tenants") from error
