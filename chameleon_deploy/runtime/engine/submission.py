"""One submit, and the cohort whose prompts are averaged."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray, IntArray
from chameleon_deploy.errors import InputError, LengthError
from chameleon_deploy.runtime.adaptation import Adapt
from chameleon_deploy.runtime.decode.prompt_lookup import check_drafts
from chameleon_deploy.runtime.engine.member import Member, members_of
from chameleon_deploy.runtime.engine.stream import Cohort, Stream
from chameleon_deploy.runtime.engine.tenants import NOBODY, Tenant
from chameleon_deploy.runtime.generation import Generate, begin_rows
from chameleon_deploy.runtime.inputs import Texts
from chameleon_deploy.runtime.sampling import SCORED, Given

if TYPE_CHECKING:  # the runtime drives the loop of this folder
    from chameleon_deploy.runtime.runtime import Runtime


@dataclass(frozen=True)
class Submission:
    """One call of `Engine.submit`.

    adapt        resolved
    members      n per prompt; those of one prompt are adjacent
    embeddings   float32 [prompts, hidden]
    cluster_ids  int64 [prompts]
    """

    stream: Stream
    adapt: Adapt
    members: list[Member]
    embeddings: FloatArray
    cluster_ids: IntArray

    @property
    def cohort_key(self) -> Hashable | None:
        """Return a key that is equal for submits that may share a cohort; None in modes without cohorts."""
        if self.adapt.tenants is not None:
            # the type, because 1 == True == 1.0
            return "tenant", frozenset((type(tenant), tenant) for tenant in self.adapt.tenants)
        return "cohort" if self.adapt.mode == "cohort" else None


def prepare(
    runtime: Runtime, prompts: Texts, generate: Generate, adapt: Adapt, capacity: int, tenant: Tenant = NOBODY
) -> Submission:
    """Check the arguments of `Engine.submit`, documented there, and embed the prompts.

    capacity  tokens that a row can hold
    """
    ids = runtime.encode(prompts, "prompts")
    check_drafts(generate.prompt_lookup_num_tokens, runtime.decoder)
    for i, prompt in enumerate(ids):
        if len(prompt) > capacity:
            raise LengthError(f"prompt {i} has {len(prompt)} tokens, a row of this engine holds {capacity}", "prompts")
    adapt = runtime.sources.resolve(adapt, len(ids))
    embeddings, cluster_ids = runtime.sources.embed_for_factors(ids, adapt.adapt_tokens)
    rows = begin_rows(ids, cluster_ids, generate, runtime.manifest.model, runtime.new_mask, capacity)
    stream = Stream(ids, cluster_ids.tolist(), adapt.mode or runtime.mode, generate.n)
    return Submission(stream, adapt, members_of(rows, stream, generate, tenant), embeddings, cluster_ids)


def prepare_scores(
    runtime: Runtime,
    prompts: Texts,
    continuations: Texts,
    generate: Generate,
    adapt: Adapt,
    capacity: int,
    tenant: Tenant,
) -> Submission:
    """Check the arguments of `Engine.submit_scores`: its rows generate what is given. Otherwise as `prepare`.

    A text is encoded together with its prompt, and cut where the prompt's own tokens end.
    """
    given = runtime.encode(continuations, "continuations", add_special_tokens=False)
    heads = runtime.encode(prompts, "prompts")
    if len(heads) == 1:
        prompts, heads = [prompts[0]] * len(given), heads * len(given)  # type: ignore[assignment]
    if len(heads) != len(given):
        raise InputError(f"{len(given)} continuations of {len(heads)} prompts: pass one each", "continuations")
    pairs = list(zip(prompts, continuations, strict=True))
    if all(isinstance(part, str) for pair in pairs for part in pair):
        whole = runtime.encode([f"{prompt}{continuation}" for prompt, continuation in pairs], "prompts")
        given = [ids[len(head) :] for head, ids in zip(heads, whole, strict=True)]
        heads = [ids[: len(head)] for head, ids in zip(heads, whole, strict=True)]
    for i, (head, ids) in enumerate(zip(heads, given, strict=True)):
        if not ids:
            raise InputError(f"continuation {i} adds no token to its prompt", "continuations")
        if len(head) + len(ids) > capacity:
            raise LengthError(f"prompt {i} and its continuation have more than {capacity} tokens", "continuations")
    own = replace(generate, max_new_tokens=list(map(len, given)), sampling=SCORED, n=1, prompt_lookup_num_tokens=0)
    submission = prepare(runtime, heads, own, adapt, capacity, tenant)
    for member, ids in zip(submission.members, given, strict=True):
        member.row.sampler = Given(member.row.prompt, ids)
    return submission


def form_cohort(runtime: Runtime, submissions: Sequence[Submission], cohort_id: int) -> None:
    """Set the factor sources of all members. The submissions have equal `cohort_key`s, or there is a single one.

    Raises ModeError, FactorsError or AdapterError.
    """
    adapt = submissions[0].adapt
    if adapt.tenants is not None:
        tenants = chain.from_iterable(submission.adapt.tenants or () for submission in submissions)
        adapt = replace(adapt, tenants=list(tenants))
    embeddings = np.concatenate([submission.embeddings for submission in submissions])
    cluster_ids = np.concatenate([submission.cluster_ids for submission in submissions])
    prompts = [prompt for submission in submissions for prompt in submission.stream.prompts]
    found = runtime.sources.of_rows(adapt, prompts, embeddings, cluster_ids)
    first = 0  # prompt of the submission
    for submission in submissions:
        if submission.cohort_key is not None:
            submission.stream.cohort = Cohort(cohort_id, len(embeddings))
        for member in submission.members:
            place = first + member.row.index // submission.stream.n
            member.source = found.sources[int(found.factor_ids[place])]
            member.adapters = member.source.adapters
            member.prompt.start = 0 if found.starts is None else int(found.starts[place])
        first += len(submission.stream.prompts)
