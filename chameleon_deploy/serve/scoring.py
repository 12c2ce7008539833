"""Log-probabilities of given texts, off the event loop and a prompt at a time, so that requests take turns."""

from __future__ import annotations

import math
from typing import TypeVar

import msgspec
import numpy as np

from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.runtime import Adapt, Adaptation, Generate, Stream
from chameleon_deploy.runtime.sampling import Choice
from chameleon_deploy.runtime.scoring import Score, prompt_logprobs, score_rows
from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.errors import ApiError, api_error
from chameleon_deploy.serve.models import Meant
from chameleon_deploy.serve.prompts import as_texts, encode
from chameleon_deploy.serve.schemas import AdaptedRequest, ScoreItem, ScoreRequest, ScoreResponse
from chameleon_deploy.serve.service import ServedModel

Body = TypeVar("Body", bound=AdaptedRequest)


async def score_prompts(served: ServedModel, ids: list[list[int]], adapt: Adapt, count: int) -> list[list[Choice]]:
    """The choices of every prompt's tokens but its first, with `count` alternatives each."""
    adaptation = await served.score(served.runtime.sources.adapt, ids, adapt)
    return [
        await served.score(prompt_logprobs, row, served.runtime.decoder, adaptation.factors.rows(np.array([i])), count)
        for i, row in enumerate(ids)
    ]


async def score(call: Call[ScoreRequest]) -> ScoreResponse:
    """/v1/score: what `Runtime.score` gives, or `Engine.submit_scores` of continuations."""
    body, served = call.body, call.served
    meant = served.models.hold(body)
    if body.continuations is not None:
        return await _score_continuations(call, meant)
    ids = await call.off_loop_if_large(lambda: encode(body.input, "input", served))
    adaptation = await served.score(served.runtime.sources.adapt, ids, adapt_options(call, meant, len(ids)))
    items = [_item(i, await served.score(_score_row, served, ids, adaptation, i)) for i in range(len(ids))]
    fingerprint = served.fingerprint(meant)
    return ScoreResponse(model=meant.model, mode=meant.mode, system_fingerprint=fingerprint, data=items)


async def _score_continuations(call: Call[ScoreRequest], meant: Meant) -> ScoreResponse:
    served = call.served
    stream = await call.off_loop_if_large(lambda: _submit(call, meant), undo=Stream.cancel)
    try:
        generations = await stream
    except BaseException:
        stream.cancel()
        raise
    items = []
    for i, generation in enumerate(generations):
        if generation.error is not None:
            raise generation.error
        found = Score(generation.token_ids, generation.token_logprobs or [], generation.cluster_id)
        items.append(msgspec.structs.replace(_item(i, found), cached_tokens=stream.cached_tokens[i]))
    fingerprint = served.fingerprint(meant)
    return ScoreResponse(model=meant.model, mode=meant.mode, system_fingerprint=fingerprint, data=items)


def _submit(call: Call[ScoreRequest], meant: Meant) -> Stream:
    """Check and submit continuations. Raises ApiError."""
    body, served = call.body, call.served
    prompts, continuations = as_texts(body.input), as_texts(body.continuations)
    if len(continuations) > served.max_prompts:
        message = f"{len(continuations)} continuations, at most {served.max_prompts} are taken"
        raise ApiError(400, "input_invalid", message, "continuations")
    generate = Generate(cache_salt=call.salt + body.cache_salt, cache_generated=body.cache_generated)
    try:
        adapt = adapt_options(call, meant, len(continuations))
        return served.engine.submit_scores(prompts, continuations, generate, adapt, call.share)
    except ChameleonError as error:
        raise api_error(error, {"prompts": "input"}.get(error.argument or "", error.argument)) from error


def adapt_options(call: Call[Body], meant: Meant, texts: int) -> Adapt:
    """Return the adaptation of the texts of one request, which are one cohort in the modes that have cohorts."""
    blends = None if meant.blends is None else list(meant.blends)
    return Adapt(
        mode=meant.mode,
        tenants=[call.tenant] * texts if meant.mode == "tenant" else None,
        adapters=blends * texts if blends is not None and len(blends) == 1 else blends,
        conditioning=call.body.conditioning,
        adapt_text=call.body.adapt_text,
        adapt_tokens=call.body.adapt_tokens,
    )


def _score_row(served: ServedModel, ids: list[list[int]], adaptation: Adaptation, i: int) -> Score:
    alone = Adaptation(
        adaptation.embeddings[[i]], adaptation.cluster_ids[[i]], adaptation.factors.rows(np.array([i]))
    )  # fmt: skip
    return score_rows([ids[i]], served.runtime.decoder, alone)[0]


def _item(index: int, score: Score) -> ScoreItem:
    return ScoreItem(
        index=index,
        cluster_id=score.cluster_id,
        logprob=score.logprob,
        perplexity=None if math.isnan(score.perplexity) else score.perplexity,
        token_ids=score.token_ids,
        token_logprobs=score.token_logprobs,
    )
