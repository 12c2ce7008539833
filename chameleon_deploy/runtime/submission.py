"""One submit, and the cohort whose prompts are averaged."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import FloatArray, IntArray, Mode
from chameleon_deploy.errors import InputError, LengthError
from chameleon_deploy.runtime.adaptation import check_conditioning
from chameleon_deploy.runtime.batch import Member, Prompt
from chameleon_deploy.runtime.factors import Factors
from chameleon_deploy.runtime.generation import begin_rows
from chameleon_deploy.runtime.inputs import MAX_ROWS, Texts, check_integer, check_number
from chameleon_deploy.runtime.runtime import Runtime
from chameleon_deploy.runtime.sampling_settings import Sampling
from chameleon_deploy.runtime.stream import Cohort, Stream


@dataclass(frozen=True)
class Submission:
    """One call of `Engine.submit`.

    members      n per prompt; those of one prompt are adjacent
    embeddings   float32 [prompts, hidden]; the caller's vectors instead if the hypernetwork reads those
    cluster_ids  int64 [prompts]
    """

    stream: Stream
    members: list[Member]
    embeddings: FloatArray
    cluster_ids: IntArray
    tenant: Hashable
    factors: Factors | None
    adapter: str | None

    @property
    def cohort_key(self) -> Hashable | None:
        """Return a key that is equal for submits that may share a cohort; None in modes without cohorts."""
        if self.stream.mode == "tenant":
            return "tenant", type(self.tenant), self.tenant  # the type, because 1 == True == 1.0
        return "cohort" if self.stream.mode == "cohort" else None


def prepare(
    runtime: Runtime,
    capacity: int,
    prompts: Texts,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | Sequence[Sampling],
    mode: Mode | None,
    tenant: Hashable | None,
    factors: Factors | None,
    n: int,
    deadline: float | None,
    adapt_tokens: int | None,
    adapter: str | None = None,
    conditioning: npt.ArrayLike | None = None,
) -> Submission:
    """Check the arguments of `Engine.submit`, documented there, and embed the prompts.

    capacity  tokens that a row can hold
    """
    n = check_integer("n", n, 1, MAX_ROWS)
    if adapt_tokens is not None:
        adapt_tokens = check_integer("adapt_tokens", adapt_tokens, 1)
    if deadline is not None and not check_number("deadline", deadline, 0):
        raise InputError("deadline must be a number of seconds above 0")
    ids = runtime.encode(prompts)
    for i, prompt in enumerate(ids):
        if len(prompt) > capacity:
            raise LengthError(f"prompt {i} has {len(prompt)} tokens, a row of this engine holds {capacity}")
    tenants = None if tenant is None else [tenant] * len(ids)
    mode = runtime.check_arguments(mode, tenants, factors, _of_prompts(adapter, len(ids)), len(ids))
    given = check_conditioning(mode, conditioning, runtime.manifest.adaptation.conditioning_size, len(ids))
    embeddings, cluster_ids = runtime.embed([prompt[:adapt_tokens] for prompt in ids])
    rows = begin_rows(ids, cluster_ids, max_new_tokens, sampling, runtime.manifest.model, capacity, n)
    stream = Stream(ids, cluster_ids.tolist(), mode, n)
    now = time.monotonic()
    end = math.inf if deadline is None else now + deadline
    shared = [Prompt(prompt) for prompt in ids]
    members = [Member(stream, shared[row.index // n], row, now, end, now) for row in rows]
    return Submission(
        stream, members, embeddings if given is None else given, cluster_ids, tenant, factors, adapter
    )  # fmt: skip


def form_cohort(runtime: Runtime, submissions: Sequence[Submission], cohort_id: int) -> None:
    """Set the factor sources of all members. The submissions have equal `cohort_key`s, or there is a single one.

    Raises ModeError, FactorsError or AdapterError.
    """
    first = submissions[0]
    embeddings = np.concatenate([submission.embeddings for submission in submissions])
    cluster_ids = np.concatenate([submission.cluster_ids for submission in submissions])
    tenants = [first.tenant] * len(embeddings) if first.stream.mode == "tenant" else None
    adapters = _of_prompts(first.adapter, len(embeddings))
    sources = iter(runtime.factor_sources(first.stream.mode, embeddings, cluster_ids, tenants, first.factors, adapters))
    for submission in submissions:
        if submission.cohort_key is not None:
            submission.stream.cohort = Cohort(cohort_id, len(embeddings))
        of_prompt = [next(sources) for _ in submission.stream.prompts]
        for member in submission.members:
            member.source = of_prompt[member.row.index // submission.stream.n]


def _of_prompts(adapter: str | None, prompts: int) -> list[str | None] | None:
    return None if adapter is None else [adapter] * prompts
